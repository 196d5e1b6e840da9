"use strict";
/* Draws the picture that is in the page, opens and closes boxes, searches, pans and zooms. */

(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const doc = JSON.parse(document.getElementById("picture-data").textContent);
  const boxes = new Map([...doc.boxes, ...doc.nodes].map((box) => [box.id, box]));
  const open = new Set(doc.boxes.filter((box) => box.open).map((box) => box.id));
  const svg = document.getElementById("canvas");
  const tooltip = document.getElementById("tooltip");
  const search = document.getElementById("search");
  const found = document.getElementById("found");
  const view = { x: 0, y: 0, scale: 1 };
  let scene = null, world = null, hits = [], current = -1;

  function element(name, attributes, parent, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }

  function drawBox({ box, x, y, width, height, depth, open: isOpen }) {
    const classes = ["box", box.kind];
    if (isOpen) classes.push("open");
    if (isOpen && depth % 2) classes.push("odd");
    if (box.children && box.sites) classes.push("adapted");
    if (box.children) classes.push("foldable");
    if (hits.includes(box.id)) classes.push("hit");
    const group = element("g", { class: classes.join(" "), "data-id": box.id, transform: `translate(${x} ${y})` }, world);
    const rx = box.kind === "input" || box.kind === "output" ? 13 : 7;
    if (box.repeats.length) {
      element("rect", { class: "shade", x: 7, y: -7, width, height, rx }, group);
      element("rect", { class: "shade", x: 3.5, y: -3.5, width, height, rx }, group);
    }
    element("rect", { class: "frame", width, height, rx }, group);
    const [name, caption] = box.words;
    let left = 11;
    if (doc.chips[box.kind]) {
      element("rect", { class: "chip", x: 7, y: height / 2 - 9, width: 18, height: 18, rx: 4 }, group);
      element("text", { class: "chip-letter", x: 16, y: height / 2 + 4 }, group, doc.chips[box.kind]);
      left = 32;
    }
    if (box.children) {
      element("path", { class: "toggle", d: isOpen ? "M10 9h9l-4.5 6.5z" : "M11.5 7.5v9l6.5-4.5z" }, group);
      left = 25;
    }
    const twoLines = Boolean(caption) || isOpen;
    element("text", { class: "name", x: left, y: twoLines ? 16 : height / 2 + 4 }, group, name);
    if (caption) element("text", { class: "caption", x: left, y: 30 }, group, caption);
    if (box.children && box.sites) {
      const wide = 10 + 7 * String(box.sites).length;
      element("rect", { class: "badge", x: width - wide - 7, y: 6, width: wide, height: 14, rx: 7 }, group);
      element("text", { class: "badge-text", x: width - wide / 2 - 7, y: 16.5 }, group, box.sites);
    }
    if (box.children) {
      element("rect", {
        class: "handle", width, height: isOpen ? Layout.headerOf(box, doc.metrics) : height, tabindex: 0,
        role: "button", "aria-expanded": isOpen, "aria-label": `${box.name} ${box.caption}`,
      }, group);
    }
  }

  function draw() {
    scene = Layout.place(boxes, doc.root, doc.metrics, (box) => open.has(box.id));
    const fresh = element("g", { class: "world" });
    if (world) world.replaceWith(fresh); else svg.append(fresh);
    world = fresh;
    scene.placed.forEach(drawBox);
    for (const { link: [, lower, source, target], points } of scene.wires) {
      const branch = boxes.get(target).adapter && boxes.get(source).kind !== "base";
      const lora = branch ? " lora" : "";
      element("path", { class: "wire" + lora, d: Layout.pathOf(points) }, world);
      if (lower !== target) continue;
      const [x, y] = points.at(-1);
      element("path", { class: "arrow" + lora, d: `M${x} ${y}l-3.5 -6h7z` }, world);
    }
    move();
  }

  const move = () => world.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
  const spotOf = (id) => scene.placed.find((placed) => placed.box.id === id);

  function fit() {
    const area = svg.getBoundingClientRect(), margin = 28;
    const byWidth = (area.width - 2 * margin) / scene.width;
    const byHeight = (area.height - 2 * margin) / scene.height;
    // Readable first: what does not fit then is reached by dragging.
    view.scale = Math.min(1.25, byWidth, Math.max(byHeight, 0.7));
    view.x = (area.width - scene.width * view.scale) / 2;
    view.y = margin;
    move();
  }

  function toggle(id) {
    const before = spotOf(id);
    if (!open.delete(id)) open.add(id);
    draw();
    // What was clicked stays under the pointer.
    const after = spotOf(id);
    view.x += (before.x - after.x) * view.scale;
    view.y += (before.y - after.y) * view.scale;
    if (document.activeElement === document.body) {
      world.querySelector(`[data-id="${id}"] > .handle`)?.focus({ preventScroll: true });
    }
    move();
  }

  function showAll(all) {
    open.clear();
    for (const box of doc.boxes) if (all || box.id === doc.root) open.add(box.id);
    draw();
    fit();
  }

  /* A block that stands for others answers to their names too: layers.17.mlp is found in layers.0. */
  function unfolded(query) {
    for (const box of doc.boxes) {
      for (const name of box.repeats.slice(1)) {
        const atoms = name.split(".");
        for (let i = 0; i < Math.max(atoms.length - 1, 1); i++) {
          const tail = atoms.slice(i).join(".").toLowerCase();
          const at = query.indexOf(tail), end = query[at + tail.length];
          const whole = at === 0 || query[at - 1] === ".";
          if (at < 0 || !whole || (end !== undefined && end !== ".")) continue;
          const first = box.fqn.split(".").slice(i).join(".").toLowerCase();
          return query.slice(0, at) + first + query.slice(at + tail.length);
        }
      }
    }
    return query;
  }

  function find() {
    const typed = search.value.trim().toLowerCase();
    const query = unfolded(typed);
    const modules = ["module", "opaque", "leaf", "call", "site", "skipped", "rejected"];
    const matches = query
      ? [...boxes.values()].filter((box) => modules.includes(box.kind) && box.fqn.toLowerCase().includes(query))
      : [];
    // The names that end with the query are meant before those that go on.
    const exact = matches.filter((box) => box.fqn.toLowerCase().endsWith(query));
    hits = (exact.length ? exact : matches).map((box) => box.id);
    current = hits.length ? 0 : -1;
    show();
  }

  function show() {
    found.textContent = search.value.trim() ? `${current + 1} / ${hits.length}` : "";
    for (let box = boxes.get(hits[current]); box && box.parent; box = boxes.get(box.parent)) open.add(box.parent);
    draw();
    const spot = spotOf(hits[current]);
    if (!spot) return;
    const area = svg.getBoundingClientRect();
    view.scale = Math.max(view.scale, 0.8);
    view.x = area.width / 2 - (spot.x + spot.width / 2) * view.scale;
    view.y = area.height / 2 - (spot.y + Math.min(spot.height, area.height / view.scale - 40) / 2) * view.scale;
    move();
  }

  function hover(event) {
    const group = event.target.closest("[data-id]");
    const box = group && boxes.get(group.dataset.id);
    tooltip.hidden = !box;
    if (!box) return;
    tooltip.replaceChildren(...box.facts.flatMap(([label, value]) => {
      const term = document.createElement("dt"), text = document.createElement("dd");
      term.textContent = label;
      text.textContent = value;
      return [term, text];
    }));
    const { width, height } = tooltip.getBoundingClientRect();
    tooltip.style.left = `${Math.max(8, Math.min(event.clientX + 16, innerWidth - width - 12))}px`;
    tooltip.style.top = `${Math.max(8, event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18)}px`;
  }

  function zoom(factor, x, y) {
    const scale = Math.min(4, Math.max(0.05, view.scale * factor));
    view.x = x - (x - view.x) * (scale / view.scale);
    view.y = y - (y - view.y) * (scale / view.scale);
    view.scale = scale;
    move();
  }

  let grip = null;
  svg.addEventListener("pointerdown", (event) => {
    grip = { x: event.clientX, y: event.clientY, moved: false };
  });
  window.addEventListener("pointermove", (event) => {
    if (!grip) return;
    const dx = event.clientX - grip.x, dy = event.clientY - grip.y;
    if (!grip.moved && Math.hypot(dx, dy) < 4) return;
    svg.classList.add("dragged");
    tooltip.hidden = true;
    view.x += dx;
    view.y += dy;
    grip = { x: event.clientX, y: event.clientY, moved: true };
    move();
  });
  window.addEventListener("pointerup", (event) => {
    const handle = grip && !grip.moved && event.target.closest?.(".handle");
    grip = null;
    svg.classList.remove("dragged");
    if (handle) toggle(handle.parentNode.dataset.id);
  });
  svg.addEventListener("keydown", (event) => {
    const handle = event.target.closest(".handle");
    if (!handle || (event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    const id = handle.parentNode.dataset.id;
    toggle(id);
    world.querySelector(`[data-id="${id}"] > .handle`)?.focus({ preventScroll: true });
  });
  svg.addEventListener("pointermove", (event) => { if (!grip?.moved) hover(event); });
  svg.addEventListener("pointerleave", () => { tooltip.hidden = true; });
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    const area = svg.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.clientX - area.left, event.clientY - area.top);
  }, { passive: false });
  search.addEventListener("input", find);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { search.value = ""; find(); search.blur(); }
    if (event.key !== "Enter" || !hits.length) return;
    current = (current + (event.shiftKey ? hits.length - 1 : 1)) % hits.length;
    show();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target === search) return;
    event.preventDefault();
    search.focus();
  });
  document.getElementById("expand").addEventListener("click", () => showAll(true));
  document.getElementById("collapse").addEventListener("click", () => showAll(false));
  document.getElementById("fit").addEventListener("click", fit);

  draw();
  fit();
  // A link to a part: graph.html#model.layers.3
  if (location.hash.length > 1) {
    search.value = decodeURIComponent(location.hash.slice(1));
    find();
  }
})();
