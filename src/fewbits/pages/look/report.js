"use strict";
(() => {
  const table = document.getElementById("all"), body = table.tBodies[0], form = document.getElementById("filters");
  const [name, fate, status, group] = ["name", "fate", "status", "group"].map((id) => document.getElementById(`by-${id}`));
  const FATE = 2, STATUS = 9, GROUP = 10, NUMBERS = new Set([4, 5, 6, 7, 8, GROUP]);
  const ORDER = ["failed", "critical", "warning", "fair", "good"];
  const rows = [...body.rows].map((row) => ({ row, cells: [...row.cells].map((cell) => cell.textContent.trim()) }));

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
      const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a === b ? 0 : a < b ? -1 : 1;
      return falls ? -order : order;
    });
    body.append(...keyed.map(([, entry]) => entry.row));
  };

  const filter = () => {
    const part = name.value.toLowerCase();
    let shown = 0;
    for (const { row, cells } of rows) {
      row.hidden = !(cells[0].toLowerCase().includes(part) && [[fate, FATE], [status, STATUS], [group, GROUP]]
        .every(([select, column]) => !select.value || select.value === cells[column]));
      shown += !row.hidden;
    }
    document.getElementById("count").value = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} tensors`;
  };

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
