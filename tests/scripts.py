"""Passages and questions in scripts that are written without spaces, generated from templates for these tests."""

import itertools

CHINESE = {
    "families": "王李张刘陈杨黄赵吴周徐孙马朱胡郭何高林",
    "names": "建国 淑芬 志强 丽华 海燕 文博 晓东 雪梅 俊杰 春兰 国栋 玉珍 天宇 思远 卫东 秀英 子涵 婷婷".split(),
    "places": "北京 上海 广州 成都 杭州 西安 南京 武汉 昆明 拉萨 哈尔滨 青岛 苏州 桂林".split(),
    "trades": "木匠 医生 渔民 教师 厨师 飞行员 律师 农民 画家 工程师 护士 记者 裁缝".split(),
    "passages": (
        "{name}于{year}年出生在{place}，从小跟着父亲学习手艺，长大以后成为一名{trade}。",
        "在{place}的老街上，人们都认识{name}。他做{trade}已经很多年了，{year}年才搬到这里居住。",
    ),
    "questions": (
        "{name}的职业是什么？",
        "{name}是在哪里出生或者居住的？",
        "{year}年搬家或者出生的{trade}{name}是谁？",
    ),
}
JAPANESE = {
    "families": "佐藤 鈴木 高橋 田中 渡辺 伊藤 山本 中村 小林 加藤".split(),
    "names": "一郎 花子 健太 美咲 大輔 陽子 翔太 さくら 直樹 ゆうこ".split(),
    "places": "東京 大阪 京都 札幌 福岡 仙台 広島 金沢 長崎 那覇 ロンドン".split(),
    "trades": "大工 医者 漁師 教師 料理人 パイロット 弁護士 農家 画家 エンジニア".split(),
    "passages": (
        "{name}は{year}年に{place}で生まれ、子供のころから手仕事が好きで、今は{trade}として働いている。",
        "{place}の古い町に住む{name}さんは、{year}年から{trade}をしていることで知られている。",
    ),
    "questions": ("{name}の職業は何ですか。", "{name}さんはどこに住んでいますか。"),
}
THAI = {
    "families": "ใจดี ทองคำ ศรีสุข บุญมา แสงทอง รักไทย วงศ์ใหญ่ พรหมมา".split(),
    "names": "สมชาย สมหญิง วิชัย มาลี ประเสริฐ กานดา อนันต์ ดวงใจ สุรชัย นิภา".split(),
    "places": "กรุงเทพ เชียงใหม่ ภูเก็ต ขอนแก่น อยุธยา สงขลา ระยอง น่าน".split(),
    "trades": "ช่างไม้ หมอ ชาวประมง ครู พ่อครัว นักบิน ทนายความ ชาวนา".split(),
    "passages": (
        "{name}เกิดที่{place}เมื่อปี{year}และเรียนรู้งานจากพ่อตั้งแต่เด็กปัจจุบันทำงานเป็น{trade}",
        "ชาวบ้านใน{place}รู้จัก{name}เป็นอย่างดีเพราะเป็น{trade}ที่นั่นมาตั้งแต่ปี{year}",
    ),
    "questions": ("{name}ทำงานอะไร", "{name}อาศัยอยู่ที่ไหน"),
}


def make_passages(script: dict, n: int, n_questions: int) -> tuple[list[str], list[tuple[str, int]]]:
    """Texts about a person each, and questions with the number of their text, spread over all texts."""
    people = ["".join(parts) for parts in itertools.product(script["families"], script["names"])]
    assert n <= len(people)
    facts = [
        {"name": people[number * 7 % len(people)], "year": 1900 + number * 13 % 120}
        | {"place": script["places"][number % len(script["places"])]}
        | {"trade": script["trades"][number % len(script["trades"])]}
        for number in range(n)
    ]
    texts = [script["passages"][number % 2].format(**fact) for number, fact in enumerate(facts)]
    numbers = [number * n // n_questions for number in range(n_questions)]
    forms = itertools.cycle(script["questions"])
    return texts, [(next(forms).format(**facts[number]), number) for number in numbers]
