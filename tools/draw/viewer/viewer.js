"use strict";
/* The page around the graphs: search, panel, table, what-if, keys, mouse and touch, files and printing. */

(() => {
  const at = (id) => document.getElementById(id);
  const documents = JSON.parse(at("picture-data").textContent);
  const looks = new Paint.Looks();
  const MEASURES = [
    ["share", "‖ΔW‖ / ‖W‖"], ["effective", "effective rank"], ["gradient", "‖gradient‖"], ["error", "merge error, ulp"], ["lost", "quantization error"],
    ["kept", "share of ΔW kept"], ["output_error", "output error / effect"],
  ];
  const tooltip = at("tooltip"), search = at("search"), found = at("found"), side = at("side");
  let found_boxes = [], current = -1;

  function made(tag, attributes = {}, ...inside) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...inside);
    return element;
  }

  /* --- panes: one graph, or several that scroll together --- */

  const graphs = documents.map((doc) => {
    const canvas = made("canvas"), stage = made("div", { class: "stage", tabindex: 0, role: "application", "aria-label": `Graph of ${doc.title}` }, canvas);
    const map = made("div", { class: "minimap", "aria-hidden": "true" }, made("canvas"), made("i"));
    const pane = made("div", { class: "pane" }, stage, map);
    if (documents.length > 1) pane.prepend(paneTitle(doc));
    at("panes").append(pane);
    const graph = new Graph(doc, canvas, looks);
    Object.assign(graph, { minimap: map, onDraw: drawMap });
    listen(graph);
    return graph;
  });
  let active = graphs[0];

  function paneTitle({ title, summary }) {
    const words = summary.map((fact) => fact.join(" ")).join(" · ");
    return made("h2", { title: words }, title, made("span", {}, words));
  }

  const others = (graph) => graphs.filter((one) => one !== graph);

  /* Moves and scales the other graphs in the same way as one graph, wherever they are. */
  function follow(graph) {
    const before = graph.followed ?? graph.view, { x, y, scale } = graph.view, by = scale / before.scale;
    graph.followed = graph.view;
    for (const other of others(graph)) {
      const { view } = other;
      other.move(x + (view.x - before.x) * by, y + (view.y - before.y) * by, view.scale * by);
      other.followed = other.view;
    }
  }

  /* Moves every graph, each in its own way. */
  function each(move) {
    for (const graph of graphs) {
      move(graph);
      graph.followed = graph.view;
    }
  }

  const fitAll = () => each((graph) => graph.fit());

  /* Moves the box of the same name in another graph to the position of the selected box. */
  function align(graph, other, twin) {
    const here = graph.spotOf(graph.selected), there = other.spotOf(twin), { view } = graph;
    const y = view.y + here.y * view.scale - there.y * view.scale;
    const x = view.x + (here.x + here.width / 2) * view.scale - (there.x + there.width / 2) * view.scale;
    other.move(x, y, view.scale);
    other.followed = other.view;
  }

  function toggle(graph, box) {
    graph.toggle(box);
    follow(graph);
    for (const other of others(graph)) {
      const twin = other.byFqn.get(box.fqn);
      if (twin?.children.length && twin.open !== box.open) other.toggle(twin);
      other.followed = other.view;
    }
  }

  /* `asked`: a name, or a part of a name, that the box stands for: layers.17.mlp is drawn as layers.0.mlp. */
  function select(graph, box, { show = true, asked = "" } = {}) {
    active = graph;
    const name = box ? graph.meant(box, asked) : "";
    tooltip.hidden = true;
    // The panel opens first, then the box moves into the remaining view.
    if (box) showDetails(box, name);
    graph.select(box, { show });
    follow(graph);
    for (const other of others(graph)) {
      const twin = name ? other.byFqn.get(other.drawnAs(name)) : null;
      other.select(twin ?? null, { show: false });
      if (twin) align(graph, other, twin);
    }
    if (box) history.replaceState(null, "", `#${encodeURIComponent(name)}`);
    markRow(name);
  }

  /* --- the panel --- */

  const TABS = ["details", "sites", "try"];

  function openTab(name, box) {
    const before = new Map(graphs.map((graph) => [graph, graph.area]));
    document.body.classList.toggle("with-side", Boolean(name));
    document.body.classList.toggle("with-table", name === "sites");
    for (const tab of TABS) {
      at(tab).hidden = tab !== name;
      at(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
      at(`show-${tab}`)?.setAttribute("aria-pressed", String(tab === name));
    }
    if (name === "sites") showSites();
    if (name === "try") tryOut();
    // The panel makes the area of the graph narrower, so the view is moved.
    each((graph) => graph.keep(before.get(graph), graph === active && box ? box : graph.selected));
  }

  const otherTab = (name) => openTab(tabOpen() === name ? "" : name);

  const tabOpen = () => (document.body.classList.contains("with-side") ? TABS.find((tab) => !at(tab).hidden) : "");

  function copyButton(text) {
    const button = made("button", { type: "button", class: "copy", title: "Copy" }, "Copy");
    button.addEventListener("click", async () => {
      await copy(text);
      button.textContent = "Copied";
    });
    return button;
  }

  async function copy(text) {
    // A page from a file may lack the clipboard API, but can copy a selected field.
    if (navigator.clipboard) {
      try { await navigator.clipboard.writeText(text); return; } catch { /* falls back to the old way below */ }
    }
    const field = made("textarea", {}, text);
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }

  function showDetails(box, name = box.fqn) {
    const list = made("dl", { class: "facts" }), inner = made("dl", { class: "facts" }), own = box.fqn.replace(/[^\w]/g, "\\$&");
    // Facts of the drawn block, with the name that the user asked for.
    const said = (text) => (name === box.fqn || !own ? text : text.replace(new RegExp(`(?<![\\w.])${own}(?!\\w)`, "g"), () => name));
    const labels = new Set(box.facts.map(([label]) => label));
    const rows = box.rows.filter((row) => row.name === name || !name || row.name.startsWith(`${name}.`));
    const repeated = ([label, value]) => REASONS[label] || (label === "module" && value === box.fqn);
    const told = [...(labels.has("trainable") ? [] : costsOf(rows)), ...box.facts.filter((one) => !repeated(one))];
    for (const [label, value] of told) list.append(made("dt", {}, label), made("dd", {}, said(value)));
    for (const [label, value] of box.internals) inner.append(made("dt", {}, label), made("dd", {}, said(value)));
    const internals = made("details", {}, made("summary", {}, "Internals"), inner);
    internals.hidden = !box.internals.length;
    const reasons = reasonsOf(box, rows, name, said).map(([text, ...names]) => made("p", { class: "reason" }, text, ...names.map((one) => made("span", {}, one))));
    for (const row of rows.length <= 4 ? rows : []) {
      for (const [key, label] of MEASURES) {
        if (row[key] !== null && !labels.has(label)) list.append(made("dt", {}, label), made("dd", {}, `${row[key].toPrecision(3)}${rows.length > 1 ? ` (${row.adapter || row.name})` : ""}`));
      }
    }
    const title = made("div", { class: "fqn" }, made("code", {}, name || "(root)"), copyButton(name));
    const words = new Set([STATES[box.state], ...box.marks.map(([mark]) => mark)].filter(Boolean));
    const marks = made("p", { class: "marks" }, ...[...words].map((word) => made("span", {}, word)));
    const lines = made("ul", { class: "lines" }, ...box.lines.map((line) => made("li", { class: `ink${line.adapter % 6}` }, `+ B·A  ${line.words}`)));
    const once = made("p", { class: "once" }, layerOf(box, "").replace(" · in ", "drawn once for "));
    const heading = box.repeats.length && name !== box.fqn ? name.split(".").slice(-2).join(".") : box.name;
    at("details").replaceChildren(made("h2", {}, heading), title, once, marks, ...reasons, lines, list, internals);
    if (tabOpen() === "details") at("details").scrollTop = 0;
    else if (tabOpen() !== "sites" || narrow()) openTab("details", box);
  }

  const STATES = { adapted: "adapted", unselected: "not adapted", refused: "cannot be adapted", full: "trained in full", rows: "rows trained" };
  const REASONS = { "not selected": "Not adapted: ", "cannot be adapted": "Cannot be adapted: " };

  /* Returns the reasons why operations in a box are not adapted. The names of the operations follow their reason. */
  function reasonsOf(box, rows, name, said) {
    const groups = new Map(), most = 6;
    for (const row of layersTogether(rows.filter((one) => one.reason))) {
      const start = `${row.state === "refused" ? "Cannot be adapted" : "Not adapted"}: `, key = start + row.reason;
      if (!groups.has(key)) groups.set(key, { start, reason: row.reason, names: [] });
      if (row.name !== name) groups.get(key).names.push(name && row.name.startsWith(`${name}.`) ? row.name.slice(name.length + 1) : row.name);
    }
    const told = [...groups.values()].map(({ start, reason, names }) => {
      const more = names.length > most ? ` and ${names.length - most} more` : "";
      return [start + reason, ...(names.length ? [names.slice(0, most).join(", ") + more] : [])];
    });
    // Nodes of a graph have no rows, but a reason of their own.
    const known = [...groups.values()].map(({ reason }) => reason);
    const others = box.facts.filter(([label, value]) => REASONS[label] && !known.some((reason) => value.endsWith(reason)));
    return [...told, ...others.map(([label, value]) => [REASONS[label] + said(value)])];
  }

  /* Returns the costs of adapters as facts. */
  function costsOf(rows) {
    const adapted = rows.filter((row) => row.state === "adapted"), { unit } = active.doc;
    const total = (key) => adapted.reduce((all, row) => all + row[key], 0), sum = (key) => total(key).toLocaleString("en");
    if (!adapted.some((row) => row.parameters)) return [];
    const several = adapted.length > 1 ? [["adapters here", String(adapted.length)]] : [], base = baseOf(rows);
    const share = base ? ` (${percent(total("flops") / base)})` : "";
    return [...several, ["trained", sum("parameters")], ["extra FLOPs", `${sum("flops")} a ${unit}${share}`], ["saved", `${sum("saved")} bytes a ${unit}, for backward`]];
  }

  /* Returns the FLOPs of operations without their adapters, or 0 if they have no common unit. */
  function baseOf(rows) {
    const each = new Map(rows.map((row) => [row.name, row.base]));
    if (each.size > 1 && active.doc.unit === "position") return 0;
    // A part of an operation that is adapted as a whole counts once.
    return [...each].reduce((all, [name, base]) => all + (each.has(name.slice(0, name.lastIndexOf("."))) ? 0 : base), 0);
  }

  /* Returns a share of extra FLOPs in words: +0.8 %. */
  const percent = (share) => `+${100 * share >= 10 ? Math.round(100 * share) : Number((100 * share).toPrecision(2))} %`;

  const narrow = () => matchMedia("(max-width: 760px)").matches;

  /* --- search --- */

  function find() {
    const query = search.value;
    const { hits, meant } = Find.search(query, active.boxes, (part) => active.partDrawnAs(part));
    found_boxes = hits;
    found.dataset.meant = meant;
    current = hits.length ? 0 : -1;
    active.hits = new Set(hits);
    step(0);
  }

  function step(by) {
    const count = found_boxes.length, box = count ? found_boxes[current = (current + by + count) % count] : null;
    const around = box ? layerOf(box, found.dataset.meant) : "";
    found.textContent = search.value.trim() ? `${current + 1} / ${count}${around}` : "";
    if (box) {
      active.select(box);
      follow(active);
      if (tabOpen() === "details") showDetails(box, active.meant(box, found.dataset.meant));
    } else active.draw();
  }

  /* Selects the next trained box, or the previous one if `by` is negative. */
  function nextAdapter(by) {
    const { trained, selected } = active, count = trained.length;
    if (!count) { found.textContent = "no adapters"; return; }
    const here = selected ? trained.findIndex((box) => box.id >= selected.id) : -1, at_one = trained[here] === selected;
    // If the selected box is not trained, the next and the previous are the nearest trained boxes around it.
    const start = selected && here < 0 ? count : here;
    const place = (by > 0 && !at_one ? Math.max(start, 0) : start + by + count) % count, box = trained[place];
    select(active, box);
    found.textContent = `adapter ${place + 1} / ${count}${box.state === "full" ? ": trained in full" : ""}${layerOf(box, "")}`;
  }

  /* Returns the layers of a hit in a block that stands for several. */
  function layerOf(box, meant) {
    for (let one = box; one; one = one.parent) {
      if (one.repeats.length) return meant ? ` · ${meant}, drawn once for ${one.name}` : ` · in ${one.name}`;
    }
    return "";
  }

  /* --- colors --- */

  const METRICS = [
    ["", "adapter"], ["rank", "rank"], ["scale", "scale"], ["parameters", "trained parameters"], ["flops", "FLOPs a token"],
    ["saved", "bytes saved a token"], ...MEASURES, ["quantized", "quantized"],
  ];
  const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

  function ramp(part) {
    const place = Math.min(0.9999, Math.max(0, part)) * (RAMP.length - 1), low = Math.floor(place), share = place - low;
    const mixed = RAMP[low].map((one, i) => Math.round(one + (RAMP[low + 1][i] - one) * share));
    return `rgba(${mixed.join(",")},0.55)`;
  }

  const SHARES = ["kept", "output_error"];
  // Counts all operations, not only the adapted ones.
  const OF_ALL = ["quantized", "lost"];
  const valueOf = (row, key) => (key === "quantized" ? (row.quantized ? 1 : 0) : row[key]);
  const counts = (row, key) => row[key] !== null && (OF_ALL.includes(key) ? row.state !== "refused" : row.state === "adapted");

  function average(rows, key) {
    const values = rows.filter((row) => counts(row, key)).map((row) => valueOf(row, key));
    return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
  }

  function colorBy(key) {
    for (const graph of graphs) {
      const values = graph.sites.filter((row) => counts(row, key)).map((row) => valueOf(row, key));
      const [low, high] = SHARES.includes(key) ? [0, 1] : [Math.min(...values), Math.max(...values)], span = high - low || 1;
      const known = new Map();
      graph.color = !key || !values.length ? null : (box) => {
        if (!known.has(box)) {
          const mean = average(box.rows, key);
          known.set(box, mean === null ? null : ramp((mean - low) / span));
        }
        return known.get(box);
      };
      graph.scale = graph.color ? [low, high] : null;
      graph.map = null;
      graph.draw();
    }
    showKey();
  }

  function showKey() {
    const { doc, scale } = active, parts = [];
    for (const [look, text] of new Map(documents.flatMap(({ legend }) => legend))) parts.push(sample(look, text, doc.chips));
    if (doc.adapters.length > 1) doc.adapters.forEach((name, i) => parts.push(sample(`line a${i % 6}`, name, doc.chips)));
    if (scale) {
      const bar = made("i", { class: "ramp" });
      bar.style.background = `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map(ramp).join(",")})`;
      parts.push(made("span", { id: "ramp" }, Number(scale[0].toPrecision(3)).toLocaleString("en"), bar, Number(scale[1].toPrecision(3)).toLocaleString("en")));
    } else if (at("color").value) parts.push(made("span", { id: "ramp" }, "no values to color by"));
    for (const note of new Set(documents.flatMap((one) => one.notes))) parts.push(made("span", { class: "note" }, note));
    at("key").replaceChildren(...parts);
  }

  /* A sign of the legend, as in tools/draw/drawing.py. */
  function sample(look, text, chips) {
    const svg = document.createElementNS(Paint.SVG, "svg"), pen = new Paint.SvgPen(svg), [kind, style] = look.split(" ");
    pen.begin(kind === "line" ? style ?? "a0" : look, 0.5, 0.5);
    if (kind === "line") { pen.rect("factor", 0, 0, 5, 13); pen.rect("factor", 8, 4, 12, 5); } else if (kind === "count") {
      pen.begin(style === "is-none" ? "bare" : "", 0, 0);
      pen.rect(style === "is-some" ? "badge some" : "badge", 0, 0, 20, 14, 7);
      pen.text("badge-text", 10, 10.5, { "is-all": "2/2", "is-some": "1/2", "is-none": "0/2" }[style] ?? "2");
      pen.end();
    } else if (kind === "repeats") { pen.rect("shade", 5, 0, 13, 11, 3); pen.rect("frame", 0, 3, 13, 11, 3); } else {
      pen.rect("frame", 0, 0, 14, 14, 4);
      if (chips[kind]) { pen.rect("chip", 0, 0, 14, 14, 4); pen.text("chip-letter", 7, 11, chips[kind]); }
      if (style === "is-refused") pen.path("hatch", hatch(14, 14));
      if (style === "is-full" || style === "is-rows") pen.rect("inner", 3, 3, 8, 8, 2);
    }
    return made("span", {}, svg, text);
  }

  /* --- the table of sites --- */

  const COSTS = [["rank", "r"], ["scale", "scale"], ["parameters", "trained"], ["flops", "FLOPs"], ["added", "+ %"], ["saved", "saved B"]];
  const SHOWN = [["name", "site"], ["count", "sites"], ["state", "state"], ...COSTS, ["shape", "weight"], ["adapter", "adapter"], ...MEASURES, ["quantized", "stored"]];
  const LONGEST = 1500;
  const UNITS = { flops: (unit) => `extra FLOPs a ${unit}, forward`, saved: (unit) => `bytes kept for backward a ${unit}`, parameters: () => "trained parameters", added: () => "extra FLOPs relative to those of the operation" };
  let order = null, down = false, eachLayer = false, rowsShown = new Map();

  function showSites() {
    const query = search.value.trim(), within = query ? new Set(found_boxes) : null;
    const inside = (row) => { for (let box = row.box; box; box = box.parent) if (within.has(box)) return true; return false; };
    const all = active.sites.filter((row) => !within || inside(row)), together = layersTogether(all);
    const rows = eachLayer ? all : together;
    const columns = SHOWN.filter(([key]) => (key !== "adapter" || active.doc.adapters.length > 1) && rows.some((row) => !["", 0, null, undefined].includes(row[key])));
    // A reason takes the place of the costs, which an operation without an adapter does not have.
    const costs = columns.filter((column) => COSTS.includes(column));
    if (!costs.length && rows.some((row) => row.reason)) columns.splice(columns.findIndex(([key]) => key === "state") + 1, 0, ["reason", "why not"]);
    if (order) {
      const words = rows.some((row) => typeof row[order] === "string"), value = (row) => row[order] ?? (words ? "" : down ? -Infinity : Infinity);
      rows.sort((a, b) => (typeof value(a) === "string" ? value(a).localeCompare(value(b), "en", { numeric: true }) : value(a) - value(b)) * (down ? -1 : 1));
    }
    const head = made("tr", {}, ...columns.map(([key, label]) => {
      const button = made("button", { type: "button", "data-key": key, title: UNITS[key]?.(active.doc.unit) ?? "" }, label + (order === key ? (down ? " ↓" : " ↑") : ""));
      button.addEventListener("click", () => { down = order === key ? !down : false; order = key; showSites(); });
      return made("th", { "aria-sort": order === key ? (down ? "descending" : "ascending") : "none" }, button);
    }));
    const body = made("tbody");
    rowsShown = new Map();
    for (const row of rows.slice(0, LONGEST)) {
      const cells = columns.map((column) => (costs.length && row.reason && costs.includes(column) ? [] : [made("td", column[0] === "name" ? { class: "long" } : {}, ...cellOf(column[0], row))]));
      if (costs.length && row.reason) cells[columns.indexOf(costs[0])] = [made("td", { class: "why", colspan: costs.length }, row.reason)];
      const line = made("tr", { tabindex: 0, "data-name": row.first ?? row.name, class: `of-${row.state}` }, ...cells.flat());
      const choose = () => select(active, row.box, { asked: row.first ?? row.name });
      line.addEventListener("click", choose);
      line.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(); });
      if (!rowsShown.has(row.box)) rowsShown.set(row.box, []);
      rowsShown.get(row.box).push(line);
      body.append(line);
    }
    const more = rows.length > LONGEST ? `; the first ${LONGEST} are shown: search to narrow them` : "";
    const states = [["adapted", "adapted"], ["unselected", "not adapted"], ["refused", "cannot be adapted"]].map(([state, text]) => [all.filter((row) => row.state === state).length, text]);
    const counts = states.filter(([count]) => count).map(([count, text]) => `${count} ${text}`).join(", ");
    const box = made("input", { type: "checkbox", id: "each-layer" });
    box.checked = eachLayer;
    box.addEventListener("change", () => { eachLayer = box.checked; showSites(); });
    const choice = together.length < all.length ? made("label", {}, box, " each layer") : "";
    at("sites").replaceChildren(made("p", {}, `${within ? `${all.length} of ${active.sites.length} linear operations match the search: ` : ""}${counts || "no linear operations"}${more}`, choice), made("table", {}, made("thead", {}, head), body));
    markRow("");
  }

  /* Returns the content of a cell. Names may break after dots and underscores. */
  function cellOf(key, row) {
    if (key === "name") return row.name.split(/(?<=[._])/).flatMap((part, i) => (i ? [made("wbr"), part] : [part]));
    return [key === "added" && row.added !== null ? percent(row.added) : written(row[key], row)];
  }

  const written = (value, row) => (value === null || value === undefined || (value === 0 && row.state !== "adapted") ? "" : typeof value === "number" ? (Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(3)) : STATES[value] ?? value);

  /* Returns one row for equal layers, as a plan writes them: layers.{0-31}.q_proj, with the mean of what differs. */
  function layersTogether(rows) {
    const groups = new Map();
    for (const row of rows) {
      // The same operation of each layer that a box stands for, with the same adapter.
      const own = active.drawnAs(row.name), key = JSON.stringify([row.box.id, own, ...["state", "adapter", "reason", "shape", "quantized", ...COSTS.map(([name]) => name)].map((name) => row[name])]);
      groups.set(key, [...(groups.get(key) ?? []), row]);
    }
    return [...groups.values()].map((group) => {
      if (group.length === 1) return group[0];
      const [first] = group, mean = (key) => (group.some((row) => row[key] !== null) ? average(group, key) : null);
      const measures = Object.fromEntries(MEASURES.map(([key]) => [key, mean(key)]));
      return { ...first, ...measures, first: first.name, name: nameOf(group.map(({ name }) => name)), count: `×${group.length}` };
    });
  }

  /* Returns names that differ in their numbers as one: layers.{0-31}.q_proj. */
  function nameOf(names) {
    const parts = names.map((name) => name.split("."));
    return parts[0].map((part, i) => (parts.some((other) => other[i] !== part) ? `{${part}-${parts.at(-1)[i]}}` : part)).join(".");
  }

  function markRow(name) {
    for (const line of at("sites").querySelectorAll("tr.chosen")) line.classList.remove("chosen");
    const all = rowsShown.get(active.selected) ?? [], meant = all.filter((line) => line.dataset.name === name), lines = meant.length ? meant : all;
    for (const line of lines) line.classList.add("chosen");
    lines[0]?.scrollIntoView({ block: "nearest" });
  }

  /* --- what if --- */

  let edited = false;
  const ASKED = {
    targets: "target_modules", exclude: "exclude_modules", saved: "modules_to_save", layers: "layers_to_transform", patterns: "layers_pattern",
    parameters: "target_parameters", scope: "scope",
  };

  /* Until the user types something, the fields show the configuration of the picture. */
  function startFrom({ doc: { config } }) {
    if (edited) return;
    for (const [id, field] of Object.entries(ASKED)) at(id).value = config.typed[field];
    at("rank").value = config.r;
    at("alpha").value = config.lora_alpha;
  }

  function tryOut() {
    startFrom(active);
    const ask = Find.asked(Object.fromEntries(Object.entries(ASKED).map(([id, field]) => [field, at(id).value])));
    const rank = Math.max(1, Number(at("rank").value) || 1), alpha = Number(at("alpha").value) || 1;
    const { targets, doc: { config: { rest, heads, uncounted } } } = active, lines = ask.objection ? [ask.objection] : [];
    let chosen = [], impossible = ask.objection;
    if (!targets.length) lines.splice(0, lines.length, "the linear operations of this picture are not known");
    else if (!ask.objection) {
      const { selected, refused, idle, left, clash, inFull } = Find.select(targets, ask, active.modules, heads);
      chosen = [...selected, ...refused];
      const odd = Object.keys(rest.rank_pattern ?? {}).find(Find.disagreement);
      const cost = selected.reduce((sum, row) => sum + Find.costOf(row, rank, odd ? {} : rest.rank_pattern), 0);
      if (clash) lines.push(impossible = clash);
      // A fused weight with adapted parts counts as its parts.
      const inParts = new Map([...new Set(selected.map((row) => row.of).filter(Boolean))].map((row) => [row, selected.filter(({ of }) => of === row).length]));
      const every = targets.reduce((sum, row) => sum + (inParts.has(row) ? Math.max(row.parts.length, inParts.get(row)) : 1), 0);
      lines.push(`${selected.length} of ${every} linear operations`, `${Math.round(cost).toLocaleString("en")} trained parameters at r = ${rank}${rest.rank_pattern && !odd ? ", and at the ranks of rank_pattern" : ""}`);
      const others = odd ? [...uncounted, "rank_pattern"] : uncounted;
      if (others.length) lines.push(`not counted here: ${others.join(", ")}; lora-fx plan counts them`);
      for (const name of left) lines.push(`selects nothing: ${name}: all that it names is left out, or part of what is selected`);
      for (const name of inFull.slice(0, 5)) lines.push(`trained in full: ${name}${elementsOf(name)}`);
      if (inFull.length > 5) lines.push(`and ${inFull.length - 5} more that are trained in full`);
      for (const name of idle) lines.push(`matches nothing: ${name}`);
      for (const row of refused.slice(0, 5)) lines.push(`cannot be adapted: ${row.name}: ${row.reason}`);
      if (refused.length > 5) lines.push(`and ${refused.length - 5} more that cannot be adapted`);
      for (const row of selected.slice(0, 8)) lines.push(`· ${row.name}`);
      if (selected.length > 8) lines.push(`and ${selected.length - 8} more`);
    }
    active.hits = new Set(chosen.map((row) => (row.rows ? active.boxOf(row.name) : row.box)));
    active.draw();
    at("verdict").replaceChildren(...lines.map((line) => made("p", {}, line)));
    at("config").textContent = impossible ? "" : Find.WRITERS[at("form").value](Find.fields(ask, rank, alpha, rest));
  }

  /* Returns a text with the number of a module's elements without adapters, if the picture has it. */
  function elementsOf(name) {
    const drawn = active.drawnAs(name), box = active.byFqn.get(drawn), added = box ? box.rows.filter((row) => row.name === drawn || row.name.startsWith(`${drawn}.`)) : [];
    return box?.elements ? `, ${(box.elements - added.reduce((sum, row) => sum + row.parameters, 0)).toLocaleString("en")} parameters` : "";
  }

  /* --- minimap --- */

  function drawMap(graph, area) {
    const { minimap, root, view } = graph, [picture, frame] = minimap.children;
    const scale = Math.min(200 / root.width, 260 / root.height);
    const small = area.width < 620 || (view.x >= 0 && view.y >= 0 && root.width * view.scale + view.x <= area.width && root.height * view.scale + view.y <= area.height);
    minimap.hidden = small;
    if (small) return;
    if (!graph.map) {
      graph.map = [root.width, root.height].map((one) => Math.round(Math.max(30, one * scale)));
      [picture.width, picture.height] = graph.map;
      const drawing = picture.getContext("2d");
      drawing.scale(scale, scale);
      // Without selection and hits, which change more often than the picture.
      const { selected, hits } = graph;
      Object.assign(graph, { selected: null, hits: new Set() });
      graph.drawBox(new Paint.CanvasPen(drawing, looks, scale), root, 0, 0, 0, [0, 0, root.width, root.height]);
      Object.assign(graph, { selected, hits });
    }
    // The visible part stays clear, with a border inside the map. It moves like the canvas, without drawing.
    const by = scale / view.scale, [width, height] = graph.map;
    const inside = (value, most) => Math.min(Math.max(value * by, 0), most);
    const [left, right] = [-view.x, area.width - view.x].map((one) => inside(one, width));
    const [top, bottom] = [-view.y, area.height - view.y].map((one) => inside(one, height));
    const size = [right - left, bottom - top].map(Math.round).join(" ");
    if (frame.dataset.size !== size) [frame.style.width, frame.style.height] = (frame.dataset.size = size).split(" ").map((one) => `${one}px`);
    frame.style.transform = `translate(${left}px, ${top}px)`;
  }

  function jump(graph, event) {
    const { minimap, root, view, area } = graph, spot = minimap.getBoundingClientRect();
    const scale = Math.min(200 / root.width, 260 / root.height);
    const x = (event.clientX - spot.left) / scale, y = (event.clientY - spot.top) / scale;
    graph.move(area.width / 2 - x * view.scale, area.height / 2 - y * view.scale, view.scale);
    follow(graph);
  }

  /* --- mouse and fingers --- */

  function listen(graph) {
    const { stage } = graph, fingers = new Map();
    let moved = false, click = { at: -Infinity };
    const place = (event) => { const { left, top } = graph.area; return [event.clientX - left, event.clientY - top]; };
    stage.addEventListener("pointerdown", (event) => {
      stage.setPointerCapture(event.pointerId);
      if (!fingers.size) moved = false;
      tooltip.hidden = true;
      fingers.set(event.pointerId, place(event));
      active = graph;
    });
    stage.addEventListener("pointermove", (event) => {
      const before = fingers.get(event.pointerId), now = place(event);
      if (!before) return hover(graph, event, now);
      if (!moved && Math.hypot(now[0] - before[0], now[1] - before[1]) < 4) return undefined;
      moved = true;
      tooltip.hidden = true;
      const other = [...fingers.entries()].find(([id]) => id !== event.pointerId)?.[1];
      fingers.set(event.pointerId, now);
      if (other) {
        const apart = (one) => Math.hypot(one[0] - other[0], one[1] - other[1]) || 1;
        graph.zoom(apart(now) / apart(before), other[0], other[1]);
      } else graph.move(graph.view.x + now[0] - before[0], graph.view.y + now[1] - before[1], graph.view.scale);
      return follow(graph);
    });
    const lift = (event) => {
      const was = fingers.delete(event.pointerId);
      if (!was || moved || event.type !== "pointerup") return;
      const [x, y] = place(event);
      // The second click of a double click is on the box of the first, which a panel may have moved.
      const again = event.timeStamp - click.at < 400 && Math.hypot(event.clientX - click.x, event.clientY - click.y) < 6;
      if (!again) click = { box: graph.boxAt(x, y), x: event.clientX, y: event.clientY };
      click.at = event.timeStamp;
      const { box } = click;
      if (!box) { select(graph, null); return; }
      if (!again) {
        const spot = graph.spotOf(box), { view } = graph;
        click.onHandle = box.children.length && x - view.x - spot.x * view.scale < 24 * view.scale && y - view.y - spot.y * view.scale < 24 * view.scale;
        select(graph, box, { show: false });
      }
      if (click.onHandle) toggle(graph, box);
    };
    stage.addEventListener("pointerup", lift);
    stage.addEventListener("pointercancel", lift);
    stage.addEventListener("dblclick", () => { if (click.box?.children.length && !click.onHandle) toggle(graph, click.box); });
    stage.addEventListener("pointerleave", () => { tooltip.hidden = true; });
    stage.addEventListener("focus", () => { active = graph; });
    stage.addEventListener("wheel", (event) => {
      event.preventDefault();
      graph.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), ...place(event));
      follow(graph);
    }, { passive: false });
    graph.minimap.addEventListener("pointerdown", (event) => { graph.minimap.setPointerCapture(event.pointerId); jump(graph, event); });
    graph.minimap.addEventListener("pointermove", (event) => { if (event.buttons) jump(graph, event); });
  }

  function hover(graph, event, [x, y]) {
    const box = event.pointerType === "mouse" ? graph.boxAt(x, y) : null;
    // The panel has the facts of the selected box.
    tooltip.hidden = !box || !box.facts.length || box === graph.selected;
    if (tooltip.hidden) return;
    const facts = [...box.facts].sort(([label], [other]) => !!REASONS[other] - !!REASONS[label]); // first why it is not adapted
    tooltip.replaceChildren(...facts.slice(0, 8).flatMap(([label, value]) => [made("dt", {}, label), made("dd", {}, value)]));
    const { width, height } = tooltip.getBoundingClientRect();
    tooltip.style.left = `${Math.max(8, Math.min(event.clientX + 16, innerWidth - width - 12))}px`;
    tooltip.style.top = `${Math.max(8, event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18)}px`;
  }

  /* --- keys --- */

  const HELP = [
    ["Tab, Shift+Tab", "next and previous box"], ["arrows", "to the box in that direction"], ["Enter", "open, or go inside"], ["Space", "open or close"],
    ["Backspace", "to the box around"], ["/", "find; Enter for the next hit"], ["+ −", "zoom"], ["f", "show everything"], ["Shift+F", "show the selected box"],
    ["n p", "next and previous adapter"], ["t", "table of sites"], ["w", "what if"], ["d", "light or dark"], ["?", "this list"], ["Esc", "close, then forget the selection"],
  ];
  at("keys").append(made("h2", {}, "Keys"), made("dl", {}, ...HELP.flatMap(([key, text]) => [made("dt", {}, key), made("dd", {}, text)])));

  const ARROWS = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };

  /* Applies a key to the selection. Returns false for any other key. */
  function walk(event) {
    const graph = active, box = graph.selected;
    if (event.key === "Tab") {
      const shown = [...graph.shown()], place = shown.indexOf(box) + (event.shiftKey ? -1 : 1);
      // Before the first box and after the last, Tab leaves the graph as it leaves any field.
      if (!shown[place]) return false;
      select(graph, shown[place]);
    } else if (ARROWS[event.key]) {
      const next = box ? graph.neighbor(box, ...ARROWS[event.key]) : graph.root;
      if (next) select(graph, next);
    } else if (event.key === "Enter" && box?.children.length) {
      if (box.open) select(graph, box.children[0]); else toggle(graph, box);
    } else if (event.key === " " && box?.children.length) toggle(graph, box);
    else if (event.key === "Backspace" && box?.parent) select(graph, box.parent);
    else return false;
    return true;
  }

  function leave() {
    found.textContent = "";
    if (tabOpen()) openTab("");
    else { active.hits = new Set(); select(active, null); }
  }

  const COMMANDS = {
    "/": () => search.focus(), "+": () => { active.zoom(1.25); follow(active); }, "=": () => { active.zoom(1.25); follow(active); },
    "-": () => { active.zoom(0.8); follow(active); }, f: fitAll,
    F: () => { active.fit(active.selected ?? active.root); follow(active); }, "?": () => at("keys").showModal(),
    d: Theme.switch, t: () => otherTab("sites"), w: () => { openTab("try"); at("targets").focus(); }, n: () => nextAdapter(1), p: () => nextAdapter(-1), Escape: leave,
  };

  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.target.type !== "range";
    if (event.ctrlKey || event.metaKey || event.altKey || at("keys").open) return;
    if (typing) {
      if (event.key === "Escape") { if (event.target === search) { search.value = ""; find(); } active.stage.focus(); }
      return;
    }
    const onGraph = event.target === document.body || graphs.some(({ stage }) => stage === event.target);
    if (onGraph && walk(event)) { active.stage.focus(); event.preventDefault(); return; }
    const command = COMMANDS[event.key];
    if (!command) return;
    event.preventDefault();
    command();
  });
  at("keys").addEventListener("click", () => at("keys").close());

  /* --- files and printing --- */

  function save(blob, suffix) {
    const link = made("a", { href: URL.createObjectURL(blob), download: `${active.doc.title}.${suffix}` });
    link.click();
    URL.revokeObjectURL(link.href);
  }

  function savePng() {
    const { root } = active, most = 12000, scale = Math.min(2, most / root.width, most / root.height), margin = 20;
    const canvas = made("canvas", { width: Math.ceil((root.width + 2 * margin) * scale), height: Math.ceil((root.height + 2 * margin) * scale) });
    const context = canvas.getContext("2d");
    context.fillStyle = getComputedStyle(document.body).backgroundColor;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.setTransform(scale, 0, 0, scale, margin * scale, margin * scale);
    active.drawBox(new Paint.CanvasPen(context, looks, scale), root, 0, 0, 0, null);
    canvas.toBlob((blob) => save(blob, "png"), "image/png");
  }

  at("save-svg").addEventListener("click", () => save(new Blob([new XMLSerializer().serializeToString(active.toSvg())], { type: "image/svg+xml" }), "svg"));
  at("save-png").addEventListener("click", savePng);
  addEventListener("beforeprint", () => at("paper").replaceChildren(...graphs.map((graph) => graph.toSvg())));
  addEventListener("afterprint", () => at("paper").replaceChildren());

  /* --- light and dark --- */

  function repaint() {
    looks.forget();
    for (const graph of graphs) { graph.map = null; graph.draw(); }
    showKey();
  }

  /* --- controls --- */

  search.addEventListener("input", () => { find(); if (tabOpen() === "sites") showSites(); });
  search.addEventListener("keydown", (event) => { if (event.key === "Enter") step(event.shiftKey ? -1 : 1); });
  at("fit").addEventListener("click", fitAll);
  at("theme").addEventListener("click", Theme.switch);
  at("help").addEventListener("click", () => at("keys").showModal());
  at("hide").addEventListener("click", () => openTab(""));
  for (const tab of TABS) {
    at(`tab-${tab}`).addEventListener("click", () => openTab(tab));
    at(`show-${tab}`)?.addEventListener("click", () => otherTab(tab));
  }
  const depth = at("depth");
  depth.max = Math.max(...graphs.map((graph) => graph.depth), 1);
  depth.value = depth.max;
  depth.addEventListener("input", () => {
    for (const graph of graphs) graph.toDepth(Number(depth.value));
    fitAll();
  });
  const known = ([key]) => !key || graphs.some((graph) => graph.sites.some((row) => row[key]));
  at("color").append(...METRICS.filter(known).map(([key, label]) => made("option", { value: key }, label)));
  at("color").addEventListener("change", () => colorBy(at("color").value));
  at("form").append(...Object.keys(Find.WRITERS).map((name) => made("option", {}, name)));
  for (const id of [...Object.keys(ASKED), "rank", "alpha", "form"]) at(id).addEventListener("input", () => { edited ||= id !== "form"; tryOut(); });
  at("copy-config").addEventListener("click", () => copy(at("config").textContent));
  if (documents.length === 1) at("summary").append(...documents[0].summary.map(([label, value]) => made("div", {}, made("dt", {}, label), made("dd", {}, value))));
  new ResizeObserver(() => graphs.forEach((graph) => graph.draw())).observe(at("panes"));
  Theme.onChange(repaint);

  // A link to a part: graph.html#model.layers.3
  function jumpToHash() {
    const fqn = decodeURIComponent(location.hash.slice(1));
    if (fqn) select(active, active.boxOf(fqn), { asked: fqn });
  }
  addEventListener("hashchange", jumpToHash);

  showKey();
  each((graph) => graph.begin());
  jumpToHash();
  // For programs that control the page, such as its tests.
  window.loraFx = { graphs, select: (fqn) => select(active, active.boxOf(fqn), { asked: fqn }) };
})();
