// Tables that can be sorted: a click on a heading sorts by its column, another the other way round.
"use strict";

const words = new Intl.Collator("en", { numeric: true });

// Figures as figures, everything else as text; cells without text come last either way.
function compare(a, b, up) {
  if (!a || !b) return a === b ? 0 : a ? -1 : 1;
  const [x, y] = [a, b].map((text) => (/^[-+]?[0-9.]+(e[-+]?[0-9]+)?( %)?$/i.test(text) ? parseFloat(text) : NaN));
  const order = Number.isNaN(x) || Number.isNaN(y) ? words.compare(a, b) : x - y;
  return up ? order : -order;
}

for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const body = heading.closest("table").tBodies[0];
    const up = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const text = (row) => row.cells[heading.cellIndex].textContent.replaceAll("\u00a0", " ").trim();
    body.append(...[...body.rows].sort((a, b) => compare(text(a), text(b), up)));
  });
}
