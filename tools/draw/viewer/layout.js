"use strict";
/* The arithmetic of tools/coordinates.py and tools/layout.py, for boxes that open and close in the
   browser. tests/tools/test_viewer.py compares the two: change them together. */

const Layout = (() => {
  const isDummy = (name) => name.startsWith("~");
  const total = (numbers) => numbers.reduce((a, b) => a + b, 0);

  function grid(ids, sizes, m) {
    const widths = ids.map((name) => sizes.get(name)[0]);
    let best = null, least = Infinity, limit = -m.gapX;
    for (const width of widths) {
      limit += width + m.gapX;
      const local = pack(ids, sizes, Math.max(limit, ...widths), m);
      const cost = Math.max(local.width, local.height * m.aspect);
      if (cost < least) { best = local; least = cost; }
    }
    return best;
  }

  function pack(ids, sizes, limit, m) {
    const spots = new Map();
    let left = 0, top = 0, width = 0, row = 0, column = [0, 0];
    for (const name of ids) {
      const [w, h] = sizes.get(name), below = column[1] + m.gapY;
      if (column[1] && below + h <= row && left + w <= limit) {
        spots.set(name, [left, top + below]);
        column = [Math.max(column[0], w), below + h];
      } else {
        left = column[1] ? left + column[0] + m.gapX : 0;
        if (left && left + w > limit) { left = 0; top += row + m.gapY; row = 0; }
        spots.set(name, [left, top]);
        column = [w, h];
      }
      row = Math.max(row, column[1]);
      width = Math.max(width, left + column[0]);
    }
    return { width, height: top + row, spots, wires: [] };
  }

  function mean(center, names) {
    const boxes = names.filter((name) => !isDummy(name));
    const pulling = boxes.length ? boxes : names;
    return total(pulling.map((name) => center.get(name))) / pulling.length;
  }

  function settle(row, wanted, weight, wide, center, m) {
    let offset = 0;
    const offsets = [], blocks = [];
    row.forEach((name, i) => {
      if (i) offset += (wide.get(row[i - 1]) + wide.get(name)) / 2 + m.gapX;
      offsets.push(offset);
      let block = [(wanted(name) - offset) * weight(name), weight(name), 1];
      while (blocks.length && blocks.at(-1)[0] / blocks.at(-1)[1] > block[0] / block[1]) {
        const last = blocks.pop();
        block = [last[0] + block[0], last[1] + block[1], last[2] + block[2]];
      }
      blocks.push(block);
    });
    let index = 0;
    for (const [sum, mass, count] of blocks) {
      for (let i = 0; i < count; i++, index++) center.set(row[index], sum / mass + offsets[index]);
    }
  }

  function centers(layers, wide, m) {
    const above = new Map(), below = new Map();
    for (const name of wide.keys()) { above.set(name, []); below.set(name, []); }
    for (const [upper, lower] of layers.links) {
      below.get(upper).push(lower);
      above.get(lower).push(upper);
    }
    const center = new Map();
    for (const row of layers.rows) settle(row, () => 0, () => 1, wide, center, m);
    const upward = [...layers.rows].reverse();
    for (let sweep = 0; sweep < m.sweeps; sweep++) {
      const near = sweep % 2 ? below : above;
      for (const row of sweep % 2 ? upward : layers.rows) {
        const alone = (name) => !above.get(name).length && !below.get(name).length;
        const wishes = new Map(row.map((name) => {
          const others = near.get(name);
          if (alone(name)) return [name, center.get(row[0])];
          return [name, others.length ? mean(center, others) : center.get(name)];
        }));
        const weight = (name) => (alone(name) ? 0.001 : isDummy(name) ? m.slack : 1);
        settle(row, (name) => wishes.get(name), weight, wide, center, m);
      }
    }
    return center;
  }

  function portsOf(layers, middle, wide, m) {
    const ending = new Map(), ports = [];
    layers.links.forEach(([, lower], index) => {
      if (!ending.has(lower)) ending.set(lower, []);
      ending.get(lower).push(index);
    });
    for (const [lower, steps] of ending) {
      const from = (index) => middle.get(layers.links[index][0]);
      steps.sort((a, b) => from(a) - from(b));
      const gap = Math.min(m.port, wide.get(lower) / (steps.length + 1));
      steps.forEach((index, i) => {
        ports[index] = middle.get(lower) + (i - (steps.length - 1) / 2) * gap;
      });
    }
    return ports;
  }

  function flow(sizes, layers, m) {
    const sizeOf = (name) => sizes.get(name) ?? [m.dummy, 0];
    const wide = new Map(layers.rows.flat().map((name) => [name, sizeOf(name)[0]]));
    const center = centers(layers, wide, m);
    let left = Infinity, right = -Infinity;
    for (const [name, w] of wide) {
      left = Math.min(left, center.get(name) - w / 2);
      right = Math.max(right, center.get(name) + w / 2);
    }
    const spots = new Map(), bands = new Map();
    let y = 0;
    for (const row of layers.rows) {
      const height = Math.max(...row.map((name) => sizeOf(name)[1]));
      for (const name of row) {
        bands.set(name, [y, y + height]);
        if (!sizes.has(name)) continue;
        const [w, h] = sizes.get(name);
        spots.set(name, [center.get(name) - left - w / 2, y + (height - h) / 2]);
      }
      y += height + m.flowY;
    }
    const middle = new Map([...wide.keys()].map((name) => [name, center.get(name) - left]));
    const ports = portsOf(layers, middle, wide, m);
    const wires = layers.links.map((link, index) => {
      const [upper, lower] = link, x = middle.get(upper), port = ports[index];
      const start = sizes.has(upper) ? spots.get(upper)[1] + sizes.get(upper)[1] : bands.get(upper)[1];
      const end = sizes.has(lower) ? spots.get(lower)[1] : bands.get(lower)[1];
      return [link, [[x, start], [x, bands.get(upper)[1]], [port, bands.get(lower)[0]], [port, end]]];
    });
    return { width: right - left, height: y - m.flowY, spots, wires };
  }

  const headerOf = (box, m) => (box.words[1] ? m.header : m.bareHeader);

  /* Places every box that is visible. `boxes`: Map of id to entry; `isOpen`: entry -> boolean. */
  function place(boxes, root, m, isOpen) {
    const inside = new Map();
    function measure(box) {
      if (!box.children || !isOpen(box)) return box.size;
      const sizes = new Map(box.children.map((id) => [id, measure(boxes.get(id))]));
      const local = box.layers ? flow(sizes, box.layers, m) : grid(box.children, sizes, m);
      const width = Math.max(local.width + 2 * m.pad, box.size[0]);
      const height = local.height + headerOf(box, m) + m.pad;
      inside.set(box.id, { ...local, dx: (width - local.width) / 2, width, height });
      return [width, height];
    }
    const placed = [], wires = [];
    function put(box, x, y, depth) {
      const local = inside.get(box.id);
      const [width, height] = local ? [local.width, local.height] : box.size;
      placed.push({ box, x, y, width, height, depth, open: Boolean(local) });
      if (!local) return;
      const dx = x + local.dx, dy = y + headerOf(box, m);
      for (const [link, points] of local.wires) {
        wires.push({ link, points: points.map(([px, py]) => [px + dx, py + dy]) });
      }
      for (const id of box.children) {
        const [cx, cy] = local.spots.get(id);
        put(boxes.get(id), cx + dx, cy + dy, depth + 1);
      }
    }
    const [width, height] = measure(boxes.get(root));
    put(boxes.get(root), 0, 0, 0);
    return { placed, wires, width, height };
  }

  function pathOf([[x, y0], [, y1], [u, y2], [, y3]]) {
    const n = (value) => Math.round(value * 10) / 10;
    const half = n((y1 + y2) / 2);
    return `M${n(x)} ${n(y0)}V${n(y1)}C${n(x)} ${half} ${n(u)} ${half} ${n(u)} ${n(y2)}V${n(y3)}`;
  }

  return { place, pathOf, headerOf };
})();

if (typeof module !== "undefined") module.exports = Layout;
