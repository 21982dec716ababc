"""The look of a comparison's page beside what all pages have, and the little script that sorts its table and enlarges its pictures."""

STYLE = """
main { max-width: 1240px; }
:root { --muted: #5b6572; --good: #1d6b3c; --wash-ref: #f3f5f8; }
h2 { break-after: avoid; }
a, summary, button, [tabindex] { outline-offset: 2px; }
:focus-visible { outline: 2.5px solid var(--blue); }
.badge { display: inline-block; border: 1.5px solid var(--warn); color: var(--warn); border-radius: 6px;
  padding: 2px 10px; font-weight: 600;
  font-size: 14.5px; margin: 8px 0; }
.lines { margin: 8px 0; padding-left: 20px; font-size: 15px; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.wide { overflow-x: auto; max-width: 100%; position: relative; }
.wide:focus-visible { outline-offset: -2px; }
table.all th { vertical-align: bottom; white-space: normal; min-width: 84px; line-height: 1.3; color: var(--muted); }
table.all thead th { border-bottom: 1.5px solid #aab3bd; }
table.all th.narrow { min-width: 0; }
table.all tbody th, table.grid tbody th { text-align: left; font-weight: 500; color: var(--ink);
  background: #fff; position: sticky; left: 0; z-index: 1;
  border-bottom: 1px solid var(--line); padding: 6px 12px 6px 0; min-width: 190px; max-width: 280px; overflow-wrap: anywhere; white-space: normal;
  vertical-align: middle; }
table.all thead th:first-child, table.grid thead th:first-child { position: sticky; left: 0; background: #fff; z-index: 2;
  text-align: left; padding-left: 0; }
table.all tbody td:first-child { text-align: right; padding-left: 10px; }
table.all tr.reference td, table.all tr.reference th { background: var(--wash-ref); }
table.all tr.reference th { padding-left: 6px; }
.tag { display: block; color: var(--muted); font-size: 12.5px; }
th.name, td.name { text-align: left !important; min-width: 140px; max-width: 240px; white-space: normal; overflow-wrap: anywhere; }
h3 { font-size: 16px; margin: 24px 0 6px; }
td.best { font-weight: 650; color: var(--good); }
td.best .pm { font-weight: 400; }
.pm { color: var(--muted); }
sup.mark { color: var(--warn); font-weight: 650; font-size: 11.5px; }
table.all thead button { font: inherit; color: inherit; background: none; border: 0; padding: 0; margin: 0; text-align: inherit; cursor: pointer; }
table.all thead button:hover { color: var(--blue); }
th[aria-sort=ascending] button::after { content: " \\25B2"; font-size: 10px; }
th[aria-sort=descending] button::after { content: " \\25BC"; font-size: 10px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 18px 22px; margin: 12px 0; }
.panels figure { margin: 0; break-inside: avoid; }
.panels figcaption { font-size: 14.5px; font-weight: 600; }
.panels svg { width: 100%; height: auto; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 14px; margin: 8px 0; padding: 0; list-style: none; }
.legend svg { width: 34px; height: 12px; vertical-align: middle; margin-right: 6px; }
table.grid { width: auto; font-size: 13.5px; }
table.grid th { white-space: normal; vertical-align: bottom; text-align: left; font-weight: 500; padding: 4px 6px; }
table.grid td { padding: 3px; border-bottom: 0; }
table.grid tbody th { border-bottom: 0; vertical-align: middle; min-width: 110px; max-width: 180px; }
.prompt { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden; width: 132px; overflow-wrap: anywhere; }
table.grid img { width: 132px; height: 132px; object-fit: contain; margin: 0; background: var(--wash); border-radius: 4px; }
img.tiny { image-rendering: pixelated; }
table.grid button { border: 0; padding: 0; background: none; cursor: zoom-in; display: block; border-radius: 4px; }
dialog { border: 0; border-radius: 10px; padding: 16px 18px; max-width: 96vw; max-height: 96vh;
  box-shadow: 0 8px 40px rgba(0,0,0,.35); color: var(--ink); }
dialog::backdrop { background: rgba(20,26,34,.72); }
dialog img { margin: 0 auto 10px; max-width: 90vw; max-height: 72vh; width: auto; min-height: min(256px, 50vh); object-fit: contain; }
dialog p { margin: 4px 0; font-size: 14.5px; overflow-wrap: anywhere; }
dialog .bar { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 10px; }
dialog button { font: inherit; font-size: 14.5px; padding: 6px 14px; border: 1px solid #9aa4af; border-radius: 6px;
  background: #fff; color: var(--ink); cursor: pointer; }
.facts dd ul { margin: 0; padding-left: 18px; }
table.grid tbody th { min-width: 130px; }
.paper { display: none; }
@media (max-width: 620px) {
  main { padding: 22px 14px 48px; }
  h1 { font-size: 24px; }
  h2 { margin-top: 34px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
  table.all tbody th, table.grid tbody th { min-width: 92px; max-width: 34vw; font-size: 13px; }
  table.all th, table.all td { padding-left: 7px; padding-right: 7px; }
  .prompt, table.grid img { width: 108px; }
  table.grid img { height: 108px; }
  pre { font-size: 12px; }
}
@media print {
  @page { margin: 14mm 12mm; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  section { break-before: page; }
  section.flows, section:first-of-type { break-before: auto; }
  .wide { overflow: visible; }
  table.all, table.grid { font-size: 8pt; }
  table.all th, table.all td { white-space: normal; padding: 3px 4px; min-width: 0; }
  table.all tbody th, table.grid tbody th, table.all thead th:first-child, table.grid thead th:first-child { position: static; min-width: 0; }
  tr, figure, dd { break-inside: avoid; }
  table.grid { width: 100%; table-layout: fixed; }
  table.grid img { width: 100%; max-width: 40mm; height: auto; }
  table.grid button { width: 100%; }
  details::details-content { content-visibility: visible; height: auto; }
  .prompt { width: auto; display: block; }
  pre { white-space: pre-wrap; border: 1px solid var(--line); background: none; }
  dialog, .screen { display: none !important; }
  .paper { display: block; margin-bottom: 12pt; }
}
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.all")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], given = [...body.rows];
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.dataset.first || "ascending", second = first === "ascending" ? "descending" : "ascending";
      const was = head.getAttribute("aria-sort"), now = was === first ? second : was === second ? "none" : first;
      heads.forEach(other => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", now);
      const key = row => row.cells[i].dataset.v, sign = now === "descending" ? -1 : 1;
      const order = (a, b) => {
        const x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
      };
      body.append(...(now === "none" ? given : [...given].sort(order)));
    });
  });
}
const dialog = document.querySelector("dialog");
for (const table of dialog ? document.querySelectorAll("table.grid") : []) {
  const pictures = [...table.tBodies[0].rows].map(row => [...row.cells].slice(1).map(cell => cell.querySelector("img")));
  const show = (row, column) => {
    const image = pictures[row][column], large = dialog.querySelector("img");
    dialog.at = [table, row, column];
    large.src = image.src;
    large.alt = image.alt;
    large.className = image.className;
    if (image.naturalWidth < 256) large.style.width = "256px"; else large.style.width = "";
    dialog.querySelector(".who").textContent = image.dataset.who;
    dialog.querySelector(".asked").textContent = image.dataset.prompt;
    if (!dialog.open) dialog.showModal();
  };
  table.step = (down, right) => {
    let [, row, column] = dialog.at;
    for (let n = 0; n < pictures.length * pictures[0].length; n++) {
      row = (row + down + pictures.length) % pictures.length;
      column = (column + right + pictures[0].length) % pictures[0].length;
      if (pictures[row][column]) return show(row, column);
    }
  };
  pictures.forEach((row, r) => row.forEach((image, c) => {
    if (!image) return;
    const button = document.createElement("button");
    button.type = "button";
    image.replaceWith(button);
    button.append(image);
    button.addEventListener("click", () => show(r, c));
  }));
}
if (dialog) {
  const keys = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1]};
  dialog.addEventListener("keydown", event => {
    if (!(event.key in keys)) return;
    event.preventDefault();
    dialog.at[0].step(...keys[event.key]);
  });
  dialog.addEventListener("click", event => {
    const step = event.target.dataset.step;
    if (step) dialog.at[0].step(...keys[step]);
    else if (event.target === dialog || event.target.dataset.close !== undefined) dialog.close();
  });
}
"""

DIALOG = (
    '<dialog class="screen" aria-label="One picture at its full size"><img alt="" src="data:,">'
    '<p class="who"></p><p class="asked note"></p><div class="bar">'
    '<button type="button" data-step="ArrowLeft">← model before</button><button type="button" data-step="ArrowRight">model after →</button>'
    '<button type="button" data-step="ArrowUp">↑ prompt before</button><button type="button" data-step="ArrowDown">prompt after ↓</button>'
    '<button type="button" data-close autofocus>Close</button></div></dialog>'
)
