"use strict";
(() => {
  const table = document.getElementById("all");
  if (!table) return;
  const body = table.tBodies[0], form = document.getElementById("filters");
  const [name, fate, status, group] = ["name", "fate", "status", "group"].map((id) => document.getElementById(`by-${id}`));
  const FATE = 2, STATUS = 9, GROUP = 10, NUMBERS = new Set([4, 5, 6, 7, 8, GROUP]);
  const ORDER = ["failed", "critical", "warning", "fair", "good"];
  const rows = [...body.rows].map((row) => ({ row, cells: [...row.cells].map((cell) => cell.textContent.trim()) }));

  const collator = new Intl.Collator("en", { numeric: true }), words = (count) => count.toLocaleString("en");
  // Browsers take seconds to lay out ten thousand rows, so the rest waits for a button, or for paper.
  const all = document.getElementById("show-all");
  let limit = 1000;

  // A number, "exact" or "not finite" as a number; NaN, which sorts last, for an empty cell.
  const number = (text) => text === "exact" || text === "not finite" ? Infinity : parseFloat(text.replaceAll(",", ""));
  const key = (cells, column) => {
    const text = cells[column];
    if (NUMBERS.has(column)) return number(text);
    if (column === 1) return text ? text.split("×").reduce((product, axis) => product * (parseInt(axis) || 1), 1) : NaN;
    return column === STATUS && text ? ORDER.indexOf(text) : text;
  };
  const missing = (value) => value === "" || Number.isNaN(value);

  const sort = (header) => {
    const falls = header.getAttribute("aria-sort") === "ascending", column = header.cellIndex;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", falls ? "descending" : "ascending");
    const keyed = rows.map((entry) => [key(entry.cells, column), entry]);
    keyed.sort(([a], [b]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      const order = typeof a === "string" ? collator.compare(a, b) : a === b ? 0 : a < b ? -1 : 1;
      return falls ? -order : order;
    });
    rows.splice(0, rows.length, ...keyed.map(([, entry]) => entry));
    filter();
    body.append(...rows.map(({ row }) => row));
  };

  const filter = () => {
    const part = name.value.toLowerCase();
    const chosen = [[fate, FATE], [status, STATUS], [group, GROUP]].filter(([select]) => select.value);
    let found = 0;
    for (const { row, cells } of rows) {
      const fits = cells[0].toLowerCase().includes(part) && chosen.every(([select, column]) => select.value === cells[column]);
      found += fits;
      row.hidden = !fits || found > limit;
    }
    const few = found > limit ? `, the first ${words(limit)} shown` : "";
    document.getElementById("count").value = `${words(found)} of ${words(rows.length)} tensors${few}`;
    all.hidden = found <= limit;
  };
  const unlimited = () => { limit = Infinity; filter(); };

  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sort(header));
    header.append(button);
  }
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  all.addEventListener("click", unlimited);
  addEventListener("beforeprint", unlimited);
  filter();

  // On narrow screens rows are grids, which some browsers no longer take for parts of a table.
  const narrow = matchMedia("screen and (max-width: 70rem)");
  const label = () => {
    if (!narrow.matches || table.hasAttribute("role")) return;
    table.setAttribute("role", "table");
    for (const part of [table.tHead, body]) part.setAttribute("role", "rowgroup");
    for (const row of table.rows) {
      row.setAttribute("role", "row");
      for (const cell of row.cells) {
        cell.setAttribute("role", cell.tagName === "TD" ? "cell" : cell.scope === "row" ? "rowheader" : "columnheader");
      }
    }
  };
  narrow.addEventListener("change", label);
  label();
})();
