"use strict";
/* One picture on one canvas: its open, selected and found boxes, its view, and its drawing. */

/* Margin of the canvas around the view, in pixels. */
const MARGIN = 192;

/* Limits of the scale, the least scale at which names can be read, and the margin around a picture that fits. */
const LEAST = 0.002, MOST = 4, READABLE = 0.75, AROUND = 24;

/* States of a box that an adapter trains. */
const TRAINED = ["adapted", "full", "rows"];

const bounded = (value, least, most) => Math.min(most, Math.max(least, value));

class Graph {
  constructor(doc, canvas, looks) {
    Object.assign(this, { doc, canvas, looks, metrics: doc.metrics, layouts: doc.layouts });
    this.view = { x: 0, y: 0, scale: 1 };
    this.selected = null;
    this.hits = new Set();
    this.color = null;
    this.onDraw = () => {};
    this.boxes = Graph.decode(doc);
    this.root = this.boxes[0];
    this.byFqn = new Map();
    this.folds = new Map();
    for (const box of this.boxes) {
      const known = this.byFqn.get(box.fqn);
      if (!known || (!Find.isModule(known) && Find.isModule(box))) this.byFqn.set(box.fqn, box);
      for (const name of box.repeats.slice(1)) this.folds.set(name, box.fqn);
    }
    this.sites = doc.sites.map((values) => this.site(values));
    this.targets = doc.targets.map((entry) => this.target(entry));
    this.stack();
  }

  static decode({ boxes: entries, strings }) {
    const word = (place) => (typeof place === "number" ? strings[place] : "");
    const pairs = (told) => told.flatMap((label, i) => (i % 2 ? [] : [[word(label), word(told[i + 1])]]));
    const boxes = entries.map((entry, id) => ({
      id, place: 0, inside: null, width: 0, height: 0, rows: [],
      kind: word(entry.kind), name: word(entry.name), caption: word(entry.caption), fqn: word(entry.fqn),
      state: word(entry.state), count: word(entry.count), size: entry.size, layout: entry.layout,
      open: Boolean(entry.open), sites: entry.sites ?? 0, bare: Boolean(entry.bare), partial: Boolean(entry.partial), parameters: (entry.parameters ?? []).map(word), elements: entry.elements ?? 0, adapter: entry.adapter, ranks: entry.ranks ?? [],
      repeats: (entry.repeats ?? []).map(word), marks: (entry.marks ?? []).map(([mark, width]) => [word(mark), width]),
      lines: (entry.lines ?? []).map(([words, adapter, active]) => ({ words: word(words), adapter, active: Boolean(active) })),
      get facts() { return pairs(entry.facts ?? []); },
      get internals() { return pairs(entry.internals ?? []); },
    }));
    entries.forEach((entry, id) => {
      boxes[id].parent = entry.parent === undefined ? null : boxes[entry.parent];
      boxes[id].children = (entry.children ?? []).map((place) => boxes[place]);
      boxes[id].children.forEach((child, place) => { child.place = place; });
    });
    return boxes;
  }

  /* A row of the table, with the box that shows it and the boxes around that box. */
  site(values) {
    const { columns, strings, texts } = this.doc;
    const row = Object.fromEntries(columns.map((name, i) => [name, texts.includes(i) ? strings[values[i]] : values[i]]));
    row.added = row.state === "adapted" && row.base ? row.flops / row.base : null;
    row.box = this.boxOf(row.name);
    for (let box = row.box; box; box = box.parent) box.rows.push(row);
    return row;
  }

  /* A target that a configuration could name, with its box. */
  target({ name, weight, attention, reason, parts = [], ...more }) {
    const word = (place) => this.doc.strings[place] ?? "";
    const row = { default: false, linear: 0, each_rank: 0, fixed: 0, width: 0, ...more, name: word(name), weight: word(weight), attention: word(attention), reason: word(reason) };
    return { ...row, parts: parts.map(([one, start, stop]) => [word(one), start, stop]), box: this.boxOf(row.name) };
  }

  /* --- names --- */

  /* Returns the name under which a module is drawn: layers.17.mlp is drawn as layers.0.mlp. */
  drawnAs(fqn) {
    for (let end = fqn.length; end > 0; end = fqn.lastIndexOf(".", end - 1)) {
      const first = this.folds.get(fqn.slice(0, end));
      if (first !== undefined) return this.drawnAs(first + fqn.slice(end));
    }
    return fqn;
  }

  /* Returns the names of all modules that a box stands for: its own first, then those of folded blocks. */
  namesOf(box) {
    if (!box.names) {
      const above = box.parent ? this.namesOf(box.parent) : [""], start = above[0].length, own = box.repeats.length ? box.repeats : [box.fqn];
      box.names = above.flatMap((name) => own.map((one) => name + one.slice(start)));
    }
    return box.names;
  }

  get modules() {
    return [...new Set(this.boxes.filter((box) => Find.isModule(box)).flatMap((box) => this.namesOf(box)))].filter(Boolean);
  }

  /* Returns the name of a box if the user asked for one of the names that it stands for. */
  meant(box, asked) {
    const part = asked?.toLowerCase();
    if (!part) return box.fqn;
    const found = this.namesOf(box).filter((name) => Find.holds({ fqn: name, parameters: box.parameters }, part) || name.toLowerCase().includes(part));
    return found.find((name) => name.toLowerCase().endsWith(part)) ?? found[0] ?? box.fqn;
  }

  /* Returns the box of a name, or of the nearest module around it. */
  boxOf(fqn) {
    const drawn = this.drawnAs(fqn);
    for (let end = drawn.length; end > 0; end = drawn.lastIndexOf(".", end - 1)) {
      const box = this.byFqn.get(drawn.slice(0, end));
      if (box) return box;
    }
    return this.root;
  }

  /* Returns a typed part of a name, in lower case, with each folded block replaced by the block that is drawn. */
  partDrawnAs(part) {
    for (const [name, first] of this.folds) {
      const atoms = name.toLowerCase().split(".");
      for (let i = 0; i < Math.max(atoms.length - 1, 1); i++) {
        const tail = atoms.slice(i).join("."), at = part.indexOf(tail), after = part[at + tail.length];
        if (at < 0 || (at > 0 && part[at - 1] !== ".") || (after !== undefined && after !== ".")) continue;
        return part.slice(0, at) + first.toLowerCase().split(".").slice(i).join(".") + part.slice(at + tail.length);
      }
    }
    return part;
  }

  /* --- open and closed --- */

  stack() {
    Place.measure(this.root, this.layouts, this.metrics);
    this.map = null;
  }

  setOpen(box, open) {
    if (box.open === open || !box.children.length) return;
    box.open = open;
    Place.stale(box);
  }

  openTo(box) {
    for (let one = box.parent; one; one = one.parent) this.setOpen(one, true);
    this.stack();
  }

  toDepth(depth) {
    const walk = (box, left) => {
      this.setOpen(box, left > 0);
      for (const child of box.children) walk(child, left - 1);
    };
    walk(this.root, depth);
    this.stack();
  }

  /* Returns the boxes that an adapter trains, in the order of the picture: an operation as a whole, and a branch on a
     bare parameter by its A. */
  get trained() {
    const within = (box) => {
      const inner = box.children.flatMap(within), alone = inner.every(({ kind }) => kind === "A");
      return TRAINED.includes(box.state) && alone && (box.parent || !inner.length) ? [box] : box.kind === "A" ? [box] : inner;
    };
    return within(this.root);
  }

  get depth() {
    const deep = (box) => (box.children.length ? 1 + Math.max(...box.children.map(deep)) : 0);
    return deep(this.root);
  }

  isShown(box) {
    for (let one = box.parent; one; one = one.parent) if (!one.open) return false;
    return true;
  }

  * shown(box = this.root) {
    yield box;
    if (box.open) for (const child of box.children) yield* this.shown(child);
  }

  /* --- positions --- */

  spotOf(box) {
    let x = 0, y = 0;
    for (let one = box; one.parent; one = one.parent) {
      const { dx, dy, spots } = one.parent.inside;
      x += dx + spots[one.place][0];
      y += dy + spots[one.place][1];
    }
    return { x, y, width: box.width, height: box.height };
  }

  boxAt(left, top) {
    const { view } = this;
    let x = (left - view.x) / view.scale, y = (top - view.y) / view.scale, box = this.root;
    if (x < 0 || y < 0 || x > box.width || y > box.height) return null;
    for (;;) {
      const { inside } = box;
      if (!box.open || !inside) return box;
      x -= inside.dx;
      y -= inside.dy;
      const child = box.children.find((one, i) => {
        const [cx, cy] = inside.spots[i];
        return x >= cx && y >= cy && x <= cx + one.width && y <= cy + one.height;
      });
      if (!child) return box;
      x -= inside.spots[child.place][0];
      y -= inside.spots[child.place][1];
      box = child;
    }
  }

  /* Returns the box nearest to the selected one in a direction. */
  neighbor(box, right, down) {
    const from = this.spotOf(box), center = (spot) => [spot.x + spot.width / 2, spot.y + spot.height / 2];
    const [x, y] = center(from);
    let best = null, least = Infinity;
    for (const other of box.parent ? box.parent.children : []) {
      if (other === box) continue;
      const [ox, oy] = center(this.spotOf(other));
      const along = (ox - x) * right + (oy - y) * down, across = Math.abs((ox - x) * down) + Math.abs((oy - y) * right);
      const cost = along + 2 * across;
      if (along > 1 && cost < least) { best = other; least = cost; }
    }
    return best;
  }

  /* --- the view --- */

  get stage() { return this.canvas.parentNode; }

  get area() { return this.stage.getBoundingClientRect(); }

  move(x, y, scale) {
    const before = this.view.scale;
    this.view = { x, y, scale: bounded(scale, LEAST, MOST) };
    this.draw(this.view.scale === before);
  }

  zoom(factor, x = this.area.width / 2, y = this.area.height / 2) {
    const { view } = this, scale = bounded(view.scale * factor, LEAST, MOST), by = scale / view.scale;
    this.move(x - (x - view.x) * by, y - (y - view.y) * by, scale);
  }

  /* Shows a box as a whole, in the middle. */
  fit(box = this.root) {
    const { width, height } = this.area, spot = this.spotOf(box);
    const scale = Math.min(1.25, (width - 2 * AROUND) / spot.width, (height - 2 * AROUND) / spot.height);
    this.move(width / 2 - (spot.x + spot.width / 2) * scale, height / 2 - (spot.y + spot.height / 2) * scale, scale);
    [this.fitted, this.fittedBox] = [this.view, box];
  }

  /* Shows the whole picture if it is readable then, or else the part around its first adapter. */
  begin() {
    this.fit();
    if (this.view.scale >= READABLE) return;
    const { width, height } = this.area, [first] = this.trained, spot = this.spotOf(first ?? this.root);
    const scale = bounded((width - 2 * AROUND) / this.root.width, READABLE, 1);
    // The neighbors of the adapter are in the view, too, if there is room, and so is the top of the picture.
    const room = width - 2 * AROUND, around = first?.parent ? this.spotOf(first.parent) : spot, { x, width: wide } = around.width * scale < room ? around : spot;
    const center = width / 2 - (x + wide / 2) * scale, end = width - AROUND - this.root.width * scale;
    const below = first ? Math.min((spot.y + spot.height) * scale - height * 0.6, spot.y * scale) : 0;
    this.move(end >= AROUND ? (end + AROUND) / 2 : bounded(center, end, AROUND), AROUND - Math.max(0, below), scale);
    this.begun = this.view;
  }

  /* Keeps the middle of the view in the middle after the size of the stage has changed, and a box that was visible
     in the view. `before`: the old size. A picture that the user has not moved yet is placed as at the start. */
  keep(before, box = this.selected) {
    if (this.view === this.fitted) { this.fit(this.fittedBox); return; }
    if (this.view === this.begun && !box) { this.begin(); return; }
    const { view, area } = this, spot = box && this.isShown(box) ? this.spotOf(box) : null;
    const along = (old, now, start, size) => {
      const by = (now - old) / 2;
      return spot && start < old && start + size > 0 && size < now - 16 ? bounded(by, 8 - start, now - 8 - start - size) : by;
    };
    const x = along(before.width, area.width, view.x + (spot?.x ?? 0) * view.scale, (spot?.width ?? 0) * view.scale);
    const y = along(before.height, area.height, view.y + (spot?.y ?? 0) * view.scale, (spot?.height ?? 0) * view.scale);
    this.move(view.x + x, view.y + y, view.scale);
  }

  /* Moves a box into the view, and zooms in only until it is readable. */
  show(box) {
    const { width, height } = this.area, spot = this.spotOf(box), scale = Math.max(this.view.scale, 0.75);
    const x = this.view.x + spot.x * scale, y = this.view.y + spot.y * scale;
    const inView = scale === this.view.scale && x >= 0 && y >= 0 && x + spot.width * scale <= width && y + Math.min(spot.height * scale, 60) <= height;
    if (inView) return this.draw();
    const tall = Math.min(spot.height, height / scale - 40);
    return this.move(width / 2 - (spot.x + spot.width / 2) * scale, height / 2 - (spot.y + tall / 2) * scale, scale);
  }

  select(box, { show = true } = {}) {
    this.selected = box;
    this.painted = null;
    if (!box) return this.draw();
    if (!this.isShown(box)) this.openTo(box);
    return show ? this.show(box) : this.draw();
  }

  toggle(box) {
    const before = this.spotOf(box), { view } = this;
    this.setOpen(box, !box.open);
    this.stack();
    if (this.selected && !this.isShown(this.selected)) this.selected = box;
    this.painted = null;
    // The clicked point stays under the pointer.
    const after = this.spotOf(box);
    this.move(view.x + (before.x - after.x) * view.scale, view.y + (before.y - after.y) * view.scale, view.scale);
  }

  /* --- drawing --- */

  /* Requests drawing in the next frame. `moved`: the picture has only moved. */
  draw(moved = false) {
    if (!moved) this.painted = null;
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.onDraw(this, this.paint());
    });
  }

  /* The canvas is larger than the view by a margin on each side. If the picture only moves, the canvas moves, and
     nothing is drawn until the view leaves the painted part. Returns the size of the view. */
  paint() {
    const { canvas, view, area } = this, { width, height } = area, ratio = window.devicePixelRatio || 1;
    const wide = Math.round(width * ratio), high = Math.round(height * ratio), margin = Math.round(MARGIN * ratio);
    const size = [wide + 2 * margin, high + 2 * margin], context = canvas.getContext("2d");
    if (canvas.width !== size[0] || canvas.height !== size[1]) {
      [canvas.width, canvas.height] = size;
      Object.assign(canvas.style, { width: `${size[0] / ratio}px`, height: `${size[1] / ratio}px` });
      this.painted = null;
    }
    this.drawn = 0;
    // By whole pixels of the screen, so that letters stay sharp.
    const shift = () => [view.x - this.painted.x, view.y - this.painted.y].map((one) => Math.round(one * ratio));
    if (this.painted && shift().some((one, axis) => Math.abs(one) >= [wide, high][axis])) this.painted = null;
    if (!this.painted) {
      this.painted = { x: view.x, y: view.y, part: [margin, margin, margin + wide, margin + high] };
      this.paintPart(context, ratio, ...this.painted.part);
    }
    let [right, down] = shift();
    const { part: [left, top, far, low] } = this.painted;
    if (margin - right < left || margin - down < top || margin - right + wide > far || margin - down + high > low) {
      this.recenter(context, ratio, right, down);
      [right, down] = [0, 0];
    }
    this.window = [margin - right, margin - down, wide, high];
    canvas.style.transform = `translate(${(right - margin) / ratio}px, ${(down - margin) / ratio}px)`;
    return area;
  }

  /* Centers the view on the canvas again, and paints the sides that become visible. */
  recenter(context, ratio, right, down) {
    const { canvas: { width, height }, painted } = this, margin = Math.round(MARGIN * ratio);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.globalAlpha = 1;
    context.globalCompositeOperation = "copy";
    context.drawImage(context.canvas, right, down);
    context.globalCompositeOperation = "source-over";
    const within = (one, most) => Math.min(Math.max(one, 0), most), [x0, y0, x1, y1] = painted.part;
    const left = within(x0 + right, width), top = within(y0 + down, height), far = within(x1 + right, width), low = within(y1 + down, height);
    const part = [left > margin ? 0 : left, top > margin ? 0 : top, far < width - margin ? width : far, low < height - margin ? height : low];
    this.painted = { x: painted.x + right / ratio, y: painted.y + down / ratio, part };
    for (const one of [[part[0], top, left, low], [far, top, part[2], low], [part[0], part[1], part[2], top], [part[0], low, part[2], part[3]]]) {
      if (one[0] < one[2] && one[1] < one[3]) this.paintPart(context, ratio, ...one);
    }
  }

  /* Draws a part of the canvas, given in canvas pixels. */
  paintPart(context, ratio, left, top, right, bottom) {
    const { scale } = this.view, margin = Math.round(MARGIN * ratio) / ratio, x = this.painted.x + margin, y = this.painted.y + margin;
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.beginPath();
    context.rect(left, top, right - left, bottom - top);
    context.clip();
    context.clearRect(left, top, right - left, bottom - top);
    context.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * x, ratio * y);
    const world = (pixel, origin) => (pixel / ratio - origin) / scale;
    this.drawBox(new Paint.CanvasPen(context, this.looks, scale), this.root, 0, 0, 0, [world(left, x), world(top, y), world(right, x), world(bottom, y)]);
    context.restore();
  }

  /* Draws the visible parts of a box and its children. If `seen` is null, draws everything. */
  drawBox(pen, box, x, y, depth, seen) {
    const { width, height } = box;
    if (seen && (x > seen[2] || y > seen[3] || x + width + 8 < seen[0] || y + height < seen[1] - 8)) return;
    if (seen && Math.max(width, height) * pen.scale < 1.5) return;
    this.drawn += 1;
    const classes = this.classesOf(box, depth);
    // Too small for text: a spot in the color of its border.
    if (seen && height * pen.scale < 7) { pen.spot(classes, x, y, width, height, this.color?.(box)); return; }
    this.drawFrame(pen, box, classes, x, y);
    if (!box.open || !box.inside || (seen && height * pen.scale < 12)) return;
    const { dx, dy, spots, wires } = box.inside;
    if (pen.scale > 0.12) for (const wire of wires) this.drawWire(pen, box, wire, x + dx, y + dy, seen);
    box.children.forEach((child, i) => this.drawBox(pen, child, x + dx + spots[i][0], y + dy + spots[i][1], depth + 1, seen));
  }

  classesOf(box, depth) {
    const isOpen = box.open && box.children.length > 0, key = isOpen ? 1 + (depth % 2) : 0;
    box.classes ??= [];
    const known = box.classes[key] ??= Graph.classes(box, isOpen, depth);
    if (!this.hits.has(box) && this.selected !== box) return known;
    return known + (this.hits.has(box) ? " hit" : "") + (this.selected === box ? " selected" : "");
  }

  static classes(box, isOpen, depth) {
    const classes = ["box", box.kind];
    if (isOpen) classes.push("open");
    if (isOpen && depth % 2) classes.push("odd");
    if (box.children.length && box.sites) classes.push("holds");
    if (box.bare) classes.push("bare");
    if (box.state) classes.push(`is-${box.state}`);
    if (box.adapter !== undefined && box.kind !== "site") classes.push(`a${box.adapter % 6}`);
    return classes.join(" ");
  }

  drawFrame(pen, box, classes, x, y) {
    const { width, height, name, caption } = box, isOpen = box.open && box.children.length;
    const radius = box.kind === "input" || box.kind === "output" ? 13 : 7;
    const fill = this.color && !isOpen ? this.color(box) : null, colored = fill ? " colored" : "";
    pen.begin(classes + colored, x, y);
    if (box.repeats.length) {
      pen.rect("shade", 7, -7, width, height, radius);
      pen.rect("shade", 3.5, -3.5, width, height, radius);
    }
    pen.rect("frame", 0, 0, width, height, radius, fill);
    if (box.state === "refused" && !isOpen) pen.path("hatch", hatch(width, height));
    if (box.state === "full" || box.state === "rows") pen.rect("inner", 3, 3, width - 6, height - 6, 5);
    const lines = isOpen ? [] : box.lines, head = isOpen ? height : height - this.metrics.branch * lines.length;
    const letter = this.doc.chips[box.kind];
    let left = 11;
    if (letter && !isOpen) {
      pen.rect("chip", 7, head / 2 - 9, 18, 18, 4);
      pen.text("chip-letter", 16, head / 2 + 4, letter);
      left = 32;
    }
    if (box.children.length) {
      pen.path("toggle", isOpen ? [["M", 10, 9], ["L", 19, 9], ["L", 14.5, 15.5]] : [["M", 11.5, 7.5], ["L", 11.5, 16.5], ["L", 18, 12]]);
      left = 25;
    }
    const two = caption || box.marks.length || isOpen;
    pen.text("name", left, two ? 16 : head / 2 + 4, name);
    if (caption) pen.text("caption", left, 30, caption);
    let at = left + caption.length * 6.1 + (caption ? 5 : 0);
    for (const [mark, wide] of box.marks) {
      pen.rect("mark", at, 20, wide, 13, 3);
      pen.text("mark-text", at + wide / 2, 29.5, mark);
      at += wide + 5;
    }
    lines.forEach((line, i) => this.drawLine(pen, line, head + this.metrics.branch * i, colored));
    if (box.count) {
      const wide = 10 + 7 * box.count.length;
      pen.rect(box.partial ? "badge some" : "badge", width - wide - 7, 6, wide, 14, 7);
      pen.text("badge-text", width - wide / 2 - 7, 16.5, box.count);
    }
    return pen.end();
  }

  /* An adapter next to W: tall B times wide A. */
  drawLine(pen, { words, adapter, active }, y, colored) {
    pen.begin(`a${adapter % 6}${active ? "" : " off"}${colored}`, 9, y);
    pen.text("plus", 1, 11, "+");
    pen.rect("factor", 11, 1, 5, 13);
    pen.rect("factor", 19, 5, 13, 5);
    pen.text("caption", 37, 11, words);
    pen.end();
  }

  drawWire(pen, box, { source, target, arrives, points: [x, y0, , y1, u, y2, , y3] }, dx, dy, seen) {
    const left = Math.min(x, u) + dx, right = Math.max(x, u) + dx;
    if (seen && (left > seen[2] || right < seen[0] || y0 + dy > seen[3] || y3 + dy < seen[1])) return;
    const from = box.children[source], to = box.children[target];
    const lora = to.adapter !== undefined && to.kind !== "site" && from.kind !== "site" && from.kind !== "base" ? " lora" : "";
    const middle = (y1 + y2) / 2;
    pen.begin("", dx, dy);
    pen.path(`wire${lora}`, [["M", x, y0], ["L", x, y1], ["C", x, middle, u, middle, u, y2], ["L", u, y3]]);
    if (arrives && pen.scale > 0.2) pen.path(`arrow${lora}`, [["M", u, y3], ["L", u - 3.5, y3 - 6], ["L", u + 3.5, y3 - 6]]);
    pen.end();
  }

  /* Returns the whole picture, with the currently open boxes, as an SVG element. */
  toSvg() {
    const margin = 20, width = this.root.width + 2 * margin, height = this.root.height + 2 * margin + 12;
    const svg = document.createElementNS(Paint.SVG, "svg"), style = document.createElementNS(Paint.SVG, "style");
    for (const [key, value] of Object.entries({ class: "picture", width, height, viewBox: `0 0 ${width} ${height}` })) svg.setAttribute(key, value);
    style.textContent = document.getElementById("picture-style").textContent;
    svg.append(style);
    this.drawBox(new Paint.SvgPen(svg), this.root, margin, margin + 12, 0, null);
    return svg;
  }
}

function hatch(width, height) {
  const steps = [];
  for (let start = 0; start < width + height; start += 9) {
    const from = start <= width ? [start, 0] : [width, start - width];
    const to = start >= height ? [start - height, height] : [0, start];
    steps.push(["M", ...from], ["L", ...to]);
  }
  return steps;
}
