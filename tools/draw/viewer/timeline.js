"use strict";
/* Live bytes of a training step: a stacked chart over the operations, and the largest tensors at the peak. */

(() => {
  const at = (id) => document.getElementById(id);
  const data = JSON.parse(at("timeline-data").textContent);
  const chart = at("chart"), tooltip = at("tooltip"), count = data.columns.length;
  const MARGIN = { left: 64, right: 14, top: 40, bottom: 26 };
  const LISTED = 12;
  let mode = "kinds", cursor = -1, frame = null;

  function made(tag, attributes = {}, ...inside) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...inside);
    return element;
  }

  function drawn(tag, attributes = {}, text = "") {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return element;
  }

  /* Three significant digits, as the command line writes them. */
  function bytes(value) {
    const [unit, size] = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3], ["B", 1]].find(([, least]) => value >= least) ?? ["B", 1];
    const scaled = value / size;
    return `${scaled >= 1e3 ? Math.round(scaled).toLocaleString("en") : Number(scaled.toPrecision(3))} ${unit}`;
  }

  /* --- bands --- */

  /* Returns one value for each column. */
  function expanded(runs) {
    const values = new Float64Array(count);
    for (let i = 0; i < runs.length; i += 2) values.fill(runs[i + 1], runs[i], runs[i + 2] ?? count);
    return values;
  }

  const family = (name) => name.replace(/(^|\.)\d+(?=\.|$)/g, "$1*");
  const hue = (index, of) => Math.round(190 + 150 * index / of);
  const band = (color) => ([name, runs]) => ({ name, values: expanded(runs), color, shown: true });
  const colorOf = (kind) => `var(--${kind.replaceAll(" ", "-")})`;
  const bands = {
    kinds: data.kinds.map((entry) => band(colorOf(entry[0]))(entry)),
    parts: data.parts.map((entry, i, all) => band(`hsl(${hue(i, all.length)} 52% var(--${i % 2 ? "odd" : "even"}))`)(entry)),
  };
  const totals = new Float64Array(count);
  for (const { values } of bands.kinds) values.forEach((value, column) => { totals[column] += value; });

  /* --- the chart --- */

  function ticksTo(most) {
    const rough = most / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step);
  }

  /* Returns the corners of a staircase over the columns. Equal neighbors share a step. */
  function stairs(sums, x, y) {
    const corners = [];
    sums.forEach((sum, column) => {
      if (column && sum === sums[column - 1]) corners.at(-1)[0] = x(column + 1);
      else corners.push([x(column), y(sum)], [x(column + 1), y(sum)]);
    });
    return corners;
  }

  /* Returns the outline of a band between two sums: to the right along its top, back along its bottom. */
  function outline(low, high, x, y) {
    const corners = [...stairs(high, x, y), ...stairs(low, x, y).reverse()];
    return `M${corners.map((corner) => corner.map((value) => value.toFixed(1)).join(" ")).join("L")}Z`;
  }

  function draw() {
    const width = chart.clientWidth, height = chart.clientHeight;
    if (!width || !height) return;
    const shown = bands[mode].filter((entry) => entry.shown);
    const sums = [new Float64Array(count)];
    for (const { values } of shown) sums.push(sums.at(-1).map((sum, column) => sum + values[column]));
    const most = Math.max(sums.at(-1).reduce((a, b) => Math.max(a, b), 0), 1);
    const x = (column) => MARGIN.left + (width - MARGIN.left - MARGIN.right) * column / count;
    const y = (value) => height - MARGIN.bottom - (height - MARGIN.top - MARGIN.bottom) * value / most;
    frame = { x, top: MARGIN.top, bottom: height - MARGIN.bottom };
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const lines = ticksTo(most).flatMap((value) => [
      drawn("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
      drawn("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, bytes(value)),
    ]);
    const areas = shown.map((entry, i) => {
      const area = drawn("path", { d: outline(sums[i], sums[i + 1], x, y), style: `fill: ${entry.color}` });
      area.append(drawn("title", {}, entry.name));
      return area;
    });
    const phases = data.phases.flatMap(([name, start], i) => {
      const end = data.phases[i + 1]?.[1] ?? count;
      const label = drawn("text", { class: "phase", x: (x(start) + x(end)) / 2, y: height - 8, "text-anchor": "middle" }, name);
      return start ? [drawn("line", { class: "edge", x1: x(start), x2: x(start), y1: MARGIN.top, y2: height - MARGIN.bottom }), label] : [label];
    });
    chart.replaceChildren(...lines, ...areas, ...phases, ...peakMark(width, y(sums.at(-1)[data.peak])), drawn("line", { class: "cursor", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" }));
    if (cursor >= 0) show(cursor);
  }

  function peakMark(width, top) {
    const place = frame.x(data.peak + 0.5), anchor = place < width / 3 ? "start" : place > 2 * width / 3 ? "end" : "middle";
    const text = `peak ${bytes(totals[data.peak])}: ${data.texts[data.operators[data.peak]]} in ${data.texts[data.modules[data.peak]]}`;
    return [
      drawn("line", { class: "mark", x1: place, x2: place, y1: frame.top - 14, y2: top }),
      drawn("text", { class: "peak", x: place, y: frame.top - 20, "text-anchor": anchor }, text),
    ];
  }

  /* --- one operation --- */

  function show(column, point) {
    cursor = Math.min(Math.max(column, 0), count - 1);
    const x = frame.x(cursor + 0.5), line = chart.querySelector(".cursor");
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    line.setAttribute("visibility", "visible");
    const facts = [
      ["operation", `${(data.columns[cursor] + 1).toLocaleString("en")} of ${data.count.toLocaleString("en")}`],
      ["operator", data.texts[data.operators[cursor]]],
      ["module", data.texts[data.modules[cursor]]],
      ["live", bytes(totals[cursor])],
    ].map(([label, value]) => [made("dt", {}, label), made("dd", {}, value)]);
    const present = bands[mode].filter(({ values }) => values[cursor]).sort((a, b) => b.values[cursor] - a.values[cursor]);
    const sizes = present.slice(0, LISTED).map(({ name, values, color }) => [made("dt", {}, swatch(color), name), made("dd", {}, bytes(values[cursor]))]);
    const left = present.slice(LISTED).reduce((sum, { values }) => sum + values[cursor], 0);
    if (left) sizes.push([made("dt", {}, `${present.length - LISTED} more`), made("dd", {}, bytes(left))]);
    tooltip.replaceChildren(...[...facts, ...sizes].flat());
    tooltip.hidden = false;
    const area = chart.getBoundingClientRect(), box = tooltip.getBoundingClientRect();
    const left_edge = area.left + x + 16, y = point?.y ?? area.top + frame.top;
    tooltip.style.left = `${left_edge + box.width > innerWidth ? Math.max(area.left + x - 16 - box.width, 0) : left_edge}px`;
    tooltip.style.top = `${Math.max(Math.min(y + 12, innerHeight - box.height - 8), 8)}px`;
  }

  function hide() {
    cursor = -1;
    tooltip.hidden = true;
    chart.querySelector(".cursor")?.setAttribute("visibility", "hidden");
  }

  const columnAt = (event) => Math.floor((event.clientX - chart.getBoundingClientRect().left - frame.x(0)) / (frame.x(1) - frame.x(0)));

  /* --- legend and table --- */

  const swatch = (color) => made("span", { class: "swatch", style: `background: ${color}` });

  /* Returns the bands of one button of the legend: equal blocks share a button. */
  function families() {
    const groups = new Map();
    for (const entry of bands[mode]) {
      const key = family(entry.name);
      groups.set(key, [...groups.get(key) ?? [], entry]);
    }
    return [...groups.values()];
  }

  function nameOf(group) {
    if (group.length === 1) return group[0].name;
    const numbers = (name) => name.match(/(?<=^|\.)\d+(?=\.|$)/g);
    const first = numbers(group[0].name), last = numbers(group.at(-1).name);
    let i = -1;
    return group[0].name.replace(/(?<=^|\.)\d+(?=\.|$)/g, () => (i += 1, first[i] === last[i] ? first[i] : `{${first[i]}-${last[i]}}`));
  }

  function showKey() {
    at("key").replaceChildren(...families().map((group) => {
      const color = group.length === 1 ? group[0].color : `linear-gradient(90deg, ${group[0].color}, ${group.at(-1).color})`;
      const size = group.reduce((sum, { values }) => sum + values[data.peak], 0);
      const button = made("button", { type: "button", "aria-pressed": String(group[0].shown), title: "Show or hide" }, swatch(color), nameOf(group), made("b", {}, bytes(size)));
      button.addEventListener("click", () => {
        for (const entry of group) entry.shown = !entry.shown;
        button.setAttribute("aria-pressed", String(group[0].shown));
        draw();
      });
      return button;
    }));
  }

  function showTable() {
    const headings = ["bytes", "", "module", "tensor or operator", "kind", "allocated in", "shape"];
    const numeric = (i) => (i < 2 ? { class: "number" } : {});
    document.querySelector("#peak thead").append(made("tr", {}, ...headings.map((text, i) => made("th", numeric(i), text))));
    document.querySelector("#peak tbody").append(...data.rows.map(([module, tensor, kind, phase, shape, dtype, size, times]) => {
      const cells = [[bytes(size)], [times > 1 ? `×${times}` : ""], [module], [tensor], [swatch(colorOf(kind)), kind], [phase], [`${shape} ${dtype}`]];
      return made("tr", {}, ...cells.map((inside, i) => made("td", numeric(i), ...inside)));
    }));
  }

  /* --- controls --- */

  function colorBy(name) {
    mode = at("color").value = name;
    showKey();
    draw();
  }

  const KEYS = {
    ArrowRight: () => show(cursor + 1), ArrowLeft: () => show(cursor < 0 ? data.peak : cursor - 1),
    Home: () => show(0), End: () => show(count - 1), p: () => show(data.peak), Escape: hide,
  };

  chart.addEventListener("pointermove", (event) => show(columnAt(event), { y: event.clientY }));
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    if (!KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  addEventListener("keydown", (event) => { if (event.key === "d" && event.target !== at("color")) Theme.switch(); });
  at("color").addEventListener("change", () => colorBy(at("color").value));
  at("theme").addEventListener("click", Theme.switch);
  at("summary").append(...[...data.facts, ["peak", bytes(totals[data.peak])]].map(([label, value]) => made("div", {}, made("dt", {}, label), made("dd", {}, value))));
  new ResizeObserver(draw).observe(chart);
  showTable();
  colorBy("kinds");
})();
