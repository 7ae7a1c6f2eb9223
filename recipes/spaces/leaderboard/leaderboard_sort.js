// A click on a column's header, or Enter on it, orders all rows by it on the server; once more turns the order.
// It stands between the table, which has one page of the rows, and the hidden textbox that app.py listens to.
// It does not know what is in the table; tests/test_leaderboard_browser.py clicks on headers.
(() => {
  function onEvent(event) {
    const header = event.target.closest?.(".board th[role=columnheader]");
    if (!header || (event.type === "keydown" && event.key !== "Enter")) return;
    const box = document.querySelector(`#${header.closest(".board").id.replace("table-", "order-")} :is(textarea, input)`);
    if (!box) return;
    const column = header.dataset.testid.replace("header-", "");
    const title = header.getAttribute("title").replace(/ [▲▼]$/, "");
    const [before, way] = box.value.split(" ");
    const isUp = before === column ? way === "down" : LOW_FIRST.includes(title);
    box.value = `${column} ${isUp ? "up" : "down"}`;
    box.dispatchEvent(new Event("input", { bubbles: true }));
  }

  document.addEventListener("click", onEvent, true);
  document.addEventListener("keydown", onEvent, true);
})();
