// The page's behaviour: figures with selectors, sigmas that can be switched, tables that can be sorted.
"use strict";

const views = JSON.parse(document.getElementById("views").textContent);
// Plotly can upload a chart to its makers' servers: neither the button nor the address is left.
const removed = ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"];
const config = { displaylogo: false, responsive: true, plotlyServerURL: "", modeBarButtonsToRemove: removed };

for (const figure of document.querySelectorAll("figure[data-plot]")) {
  const selects = [...figure.querySelectorAll("select")];
  const draw = () => {
    const view = views[figure.dataset.plot][selects.map((s) => s.value).join("|")];
    return Plotly.react(figure.querySelector(".plot"), view.data, view.layout, config);
  };
  selects.forEach((s) => s.addEventListener("change", draw));
  draw();
}

for (const box of document.querySelectorAll(".sigmas input")) {
  const apply = () => {
    const section = box.closest("section");
    const plot = section.querySelector(".plot");
    const traces = plot.data.flatMap((trace, i) => (trace.meta === box.value ? [i] : []));
    Plotly.restyle(plot, { visible: box.checked }, traces);
    for (const part of section.querySelectorAll("[data-sigma]")) {
      if (part.dataset.sigma !== box.value) continue;
      part.hidden = !box.checked;
      // What was drawn or resized while hidden has no size.
      if (box.checked) part.querySelectorAll(".plot").forEach((p) => Plotly.Plots.resize(p));
    }
  };
  box.addEventListener("change", apply);
  if (!box.checked) apply(); // a browser may restore what was chosen before a reload
}

// A cell sorts by what it shows: by its first number where all of its column have one, else as text.
const NUMBER = /^-?[\d,]+(\.\d+)?(e[+-]?\d+)?(?=%|\s|$)/;
const number = (text) => Number(text.match(NUMBER)[0].replaceAll(",", ""));

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headings.forEach((heading, column) =>
    heading.querySelector("button").addEventListener("click", () => {
      const shown = (row) => row.cells[column].textContent.trim();
      const rows = [...body.rows];
      const numeric = rows.every((row) => NUMBER.test(shown(row)));
      const before = heading.getAttribute("aria-sort");
      const descending = before === "none" ? numeric : before === "ascending"; // the largest number first
      rows.sort((a, b) => {
        const order = numeric ? number(shown(a)) - number(shown(b)) : shown(a).localeCompare(shown(b));
        return descending ? -order : order;
      });
      body.append(...rows);
      headings.forEach((h) => h.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    }),
  );
}
