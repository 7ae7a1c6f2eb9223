import os, time, json
from modeling_clara import CompressedCorpus
from modeling_clara.corpus.sync import plan_sync
def test_sync(shared_model, tmp_path):
    d=tmp_path/'in'; d.mkdir()
    for i in range(20): (d/f'{i}.txt').write_text(f'Text number {i}.')
    (d/'rows.jsonl').write_text('\n'.join(json.dumps({'id':f'r{i}','text':f'row {i}'}) for i in range(5)))
    (d/'t.csv').write_text('text,year\nhello,2001\nbye,2002\n')
    (d/'x.exe').write_bytes(b'1')
    c=CompressedCorpus.build(shared_model,d,tmp_path/'c')
    print(open(tmp_path/'c'/'files.jsonl').read()[:600]); print(open(tmp_path/'c'/'rejected.jsonl').read()); print(c.manifest.metadata)
    assert len(c)==27
    assert plan_sync(c.folder,d).is_empty
    (d/'3.txt').write_text('Changed text 3.'); os.remove(d/'4.txt'); (d/'new.md').write_text('# New\nfile')
    (d/'rows.jsonl').write_text('\n'.join(json.dumps({'id':f'r{i}','text':f'row {i}'}) for i in (0,1,2,7)))
    os.utime(d/'5.txt')
    ch=c.sync(d); print(ch)
    assert (ch.n_documents,ch.n_deleted,ch.n_unchanged)==(3,3,3)
    assert plan_sync(c.folder,d).is_empty and c.verify()==[]
    assert c.get(['3.txt'])[0]['spans'][0]['text']=='Changed text 3.'
    ch=c.upsert([{'id':'3.txt','text':'Changed text 3.','title':'3','path':'3.txt'}]); print(ch); assert ch.n_unchanged==1
