(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("js");

  // Theme: auto follows the system; the choice is kept where the browser lets a local file keep anything.
  const theme = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  const stored = (value) => {
    try {
      if (value !== undefined) localStorage.setItem("matmorph-theme", value);
      return localStorage.getItem("matmorph-theme");
    } catch {
      return null;
    }
  };
  const dress = (name) => {
    root.dataset.theme = name;
    theme.querySelector("span").textContent = name;
  };
  dress(themes.includes(stored()) ? stored() : "auto");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length];
    dress(next);
    stored(next);
  });

  // Figures that share a place: one is shown.
  for (const tabs of document.querySelectorAll(".tabs")) {
    const buttons = [...tabs.querySelectorAll("button")];
    const show = (chosen) => {
      for (const button of buttons) {
        button.setAttribute("aria-pressed", String(button === chosen));
        document.getElementById(button.getAttribute("aria-controls")).hidden = button !== chosen;
      }
    };
    buttons.forEach((button) => button.addEventListener("click", () => show(button)));
    show(buttons[0]);
  }

  // Sorting: ascending, descending, as it came. Rows without a figure stay last either way.
  const key = (row, column) => {
    const cell = row.cells[column];
    const figure = cell.dataset.v;
    if (figure === undefined) return (cell.querySelector(".path") ?? cell).textContent.trim().toLowerCase();
    return figure === "" ? null : Number(figure);
  };
  const words = new Intl.Collator("en", { numeric: true });
  const compare = (a, b) => (typeof a === "string" ? words.compare(a, b) : a - b);
  const next = { none: "ascending", ascending: "descending", descending: "none" };
  for (const table of document.querySelectorAll("table.sites")) {
    const body = table.tBodies[0];
    const original = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    const sort = (head, direction) => {
      heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", direction);
      const sign = direction === "descending" ? -1 : 1;
      const keyed = original.map((row, place) => ({ row, place, key: key(row, head.cellIndex) }));
      if (direction !== "none") {
        keyed.sort((a, b) => {
          if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.place - b.place;
          return sign * compare(a.key, b.key) || a.place - b.place;
        });
      }
      body.remove(); // rows move faster while they are in no document
      body.append(...keyed.map((entry) => entry.row));
      table.append(body);
    };
    for (const head of heads) {
      const button = head.querySelector("button");
      if (button) button.addEventListener("click", () => sort(head, next[head.getAttribute("aria-sort")]));
    }
  }

  // Filters: every word of the text somewhere in the row, and the chosen method and status.
  for (const form of document.querySelectorAll("form.filters")) {
    const table = document.getElementById(form.dataset.for);
    const none = document.getElementById(form.dataset.for + "-none");
    const rows = [...table.tBodies[0].rows].map((row) => ({ row, text: row.textContent.toLowerCase() }));
    const apply = () => {
      const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
      const wanted = ["method", "status"].filter((name) => form.elements[name]?.value);
      let shown = 0;
      for (const { row, text } of rows) {
        const fits = words.every((word) => text.includes(word)) && wanted.every((name) => row.dataset[name].split("|").includes(form.elements[name].value));
        row.hidden = !fits;
        shown += fits;
      }
      form.querySelector("output").textContent = `${shown} of ${rows.length} shown`;
      none.hidden = shown > 0;
    };
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(apply));
    apply();
    // A square of the map leads to its row, also where a filter hides it.
    const reveal = () => {
      const row = location.hash.startsWith("#site-") ? document.getElementById(location.hash.slice(1)) : null;
      if (row && row.hidden) {
        form.reset();
        setTimeout(() => row.scrollIntoView({ block: "center" }));
      }
    };
    addEventListener("hashchange", reveal);
  }
})();
