"use strict";
/* Stacks boxes that open and close. The rows, their order and the wanted centers ("wishes") are already in the page:
   tools/draw/layout.py has computed them. Its place() stacks in the same way, and tests/tools/test_viewer.py compares
   the two. */

const Place = (() => {
  /* Returns the centers of a row, as near to the wanted centers as order and widths allow (least squares). */
  function settle(refs, wishes, widthOf, m) {
    const offsets = [], blocks = [], centers = [];
    let offset = 0;
    refs.forEach((ref, i) => {
      if (i) offset += (widthOf(refs[i - 1]) + widthOf(ref)) / 2 + m.gapX;
      offsets.push(offset);
      const weight = ref < 0 ? m.slack : 1;
      let block = [(wishes[i] - offset) * weight, weight, 1];
      while (blocks.length && blocks.at(-1)[0] / blocks.at(-1)[1] > block[0] / block[1]) {
        const last = blocks.pop();
        block = [last[0] + block[0], last[1] + block[1], last[2] + block[2]];
      }
      blocks.push(block);
    });
    for (const [sum, mass, count] of blocks) {
      for (let i = 0; i < count; i++) centers.push(sum / mass + offsets[centers.length]);
    }
    return centers;
  }

  /* Stacks rows that edges connect. A ref is the index of a child, or negative for an edge that passes. */
  function flow(kids, { rows, links }, m) {
    const widthOf = (ref) => (ref < 0 ? m.dummy : kids[ref].width);
    const center = new Map();
    let left = Infinity, right = -Infinity, y = 0;
    for (const [refs, wishes] of rows) {
      settle(refs, wishes, widthOf, m).forEach((x, i) => {
        center.set(refs[i], x);
        left = Math.min(left, x - widthOf(refs[i]) / 2);
        right = Math.max(right, x + widthOf(refs[i]) / 2);
      });
    }
    const spots = [], bands = new Map();
    for (const [refs] of rows) {
      const height = Math.max(...refs.map((ref) => (ref < 0 ? 0 : kids[ref].height)));
      for (const ref of refs) {
        bands.set(ref, [y, y + height]);
        if (ref < 0) continue;
        const kid = kids[ref];
        spots[ref] = [center.get(ref) - left - kid.width / 2, y + (height - kid.height) / 2];
      }
      y += height + m.flowY;
    }
    const wires = links.map(([upper, lower, source, target, place, count]) => {
      const gap = Math.min(m.port, widthOf(lower) / (count + 1));
      const x = center.get(upper) - left;
      const port = center.get(lower) - left + (place - (count - 1) / 2) * gap;
      const [, bottom] = bands.get(upper), [top, under] = bands.get(lower);
      const start = upper < 0 ? bottom : spots[upper][1] + kids[upper].height;
      // The step that ends at a passing edge also crosses the row.
      const end = lower < 0 ? under : spots[lower][1];
      return { source, target, arrives: lower === target, points: [x, start, x, bottom, port, top, port, end] };
    });
    return { width: right - left, height: y - m.flowY, spots, wires };
  }

  /* Arranges boxes without edges in rows, wrapped like text. A box goes below its predecessor if the row is high
     enough for both. */
  function wrap(kids, m) {
    const area = kids.reduce((sum, kid) => sum + (kid.width + m.gapX) * (kid.height + m.gapY), 0);
    const limit = kids.reduce((most, kid) => Math.max(most, kid.width), Math.sqrt(area * m.aspect));
    const spots = [];
    let left = 0, top = 0, row = 0, width = 0, column = [0, 0];
    for (const kid of kids) {
      const below = column[1] + m.gapY;
      if (column[1] && below + kid.height <= row && left + kid.width <= limit) {
        spots.push([left, top + below]);
        column = [Math.max(column[0], kid.width), below + kid.height];
      } else {
        left = column[1] ? left + column[0] + m.gapX : 0;
        if (left && left + kid.width > limit) { left = 0; top += row + m.gapY; row = 0; }
        spots.push([left, top]);
        column = [kid.width, kid.height];
      }
      row = Math.max(row, column[1]);
      width = Math.max(width, left + column[0]);
    }
    return { width, height: top + row, spots, wires: [] };
  }

  const headerOf = (box, m) => (box.caption || box.marks.length ? m.header : m.bareHeader);

  /* Measures a box and its visible children. `inside` is kept until stale() deletes it. */
  function measure(box, layouts, m) {
    if (!box.open || !box.children.length) {
      [box.width, box.height] = box.size;
      return;
    }
    if (!box.inside) {
      for (const kid of box.children) measure(kid, layouts, m);
      const { layout, children } = box;
      const local = layout === undefined ? wrap(children, m) : flow(children, layouts[layout], m);
      const width = Math.max(local.width + 2 * m.pad, box.size[0]);
      const header = headerOf(box, m);
      box.inside = { ...local, dx: (width - local.width) / 2, dy: header };
      box.inside.width = width;
      box.inside.height = local.height + header + m.pad;
    }
    box.width = box.inside.width;
    box.height = box.inside.height;
  }

  /* Deletes the stored layouts that a change of `box` affects: its own, and those of the boxes around it. */
  function stale(box) {
    for (let one = box; one; one = one.parent) one.inside = null;
  }

  return { measure, stale, headerOf };
})();

if (typeof module !== "undefined") module.exports = Place;
