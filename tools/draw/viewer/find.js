"use strict";
/* What a search finds, and what a configuration would select. Neither draws, so that both can be asked
   outside of a browser, too. */

const Find = (() => {
  const normal = (text) => text.trim().toLowerCase();

  /* `r:8 type:Linear refused q_proj`: all words have to hold. */
  function parse(query) {
    return query.trim().split(/\s+/).filter(Boolean).map((word) => {
      const at = word.indexOf(":");
      return at > 0 ? { key: normal(word.slice(0, at)), value: normal(word.slice(at + 1)) } : { key: "", value: normal(word) };
    });
  }

  const STATES = {
    adapted: (box) => box.state === "adapted", refused: (box) => box.state === "refused",
    base: (box) => box.state === "unselected", full: (box) => box.state === "full",
    rows: (box) => box.state === "rows", shared: (box) => box.kind === "call" || box.marks.some(([mark]) => mark === "tied"),
    quantized: (box) => box.facts.some(([label]) => label === "stored"),
  };

  const fact = (box, label) => box.facts.filter(([one]) => one === label).map(([, value]) => normal(value));

  const KEYS = {
    r: (box, value) => box.ranks.includes(Number(value)),
    rank: (box, value) => box.ranks.includes(Number(value)),
    type: (box, value) => fact(box, "class").some((one) => one.endsWith(`.${value}`) || one === value) && isModule(box),
    pattern: (box, value) => box.rows.some((row) => normal(row.pattern) === value) || fact(box, "pattern").includes(value),
    adapter: (box, value) => box.lines.some((line) => normal(line.words).split(" · ").some((part) => part.replace(" (off)", "") === value)),
    is: (box, value) => Boolean(STATES[value]?.(box)),
    name: (box, value) => isModule(box) && normal(box.fqn).includes(value),
  };

  const isModule = (box) => ["module", "opaque", "leaf", "call", "site", "skipped", "rejected"].includes(box.kind);

  function matches(box, { key, value }) {
    if (key) return KEYS[key] ? KEYS[key](box, value) : false;
    if (STATES[value] && STATES[value](box)) return true;
    return isModule(box) && normal(box.fqn).includes(value);
  }

  /* Boxes that answer a query. The name of a folded block is that of the block that stands for it: the hit
     then says which was meant. */
  function search(query, boxes, resolve) {
    let meant = "";
    const words = parse(query).map((word) => {
      if (word.key && word.key !== "name") return word;
      const drawn = resolve(word.value);
      if (drawn !== word.value) meant = word.value;
      return { ...word, value: drawn };
    });
    if (!words.length) return { hits: [], meant };
    const found = boxes.filter((box) => words.every((word) => matches(box, word)));
    // Names that end with what was typed are meant before those that go on.
    const named = words.filter((word) => !word.key && !STATES[word.value]);
    const exact = found.filter((box) => named.every(({ value }) => normal(box.fqn).endsWith(value)));
    return { hits: named.length && exact.length ? exact : found, meant };
  }

  /* --- what a configuration selects: PEFT's rules, as lora_fx/config/selection.py has them --- */

  const SPECIAL = /[\\^$*+?()[\]{}|]/;

  /* Why an expression may mean another thing to Python than here; empty where the two agree. */
  function disagreement(pattern) {
    const odd = [
      [/\(\?(?![:=!])/, "groups that begin with (? other than (?: (?= (?!"],
      [/\\(?![.dwsDWSb\\^$*+?()[\]{}|/-])/, "escapes other than of signs and \\d \\w \\s \\b"],
      [/\[\^?\]/, "an empty class"], [/[*+?}]\+/, "possessive quantifiers"], [/\{(?!\d+(,\d*)?\})/, "a brace that counts nothing"],
      [/\[[^\]]*\[/, "a bracket in a class"], [/[^\x20-\x7e]/, "letters beyond ASCII"],
    ];
    const found = odd.find(([expression]) => expression.test(pattern));
    return found ? found[1] : "";
  }

  /* What was typed: nothing (the default), a list of names, or one expression. */
  function targets(text) {
    const typed = text.trim();
    if (!typed) return { kind: "default" };
    if (typed === "all-linear" || typed === '"all-linear"') return { kind: "default", all: true };
    const listed = typed.match(/^\[(.*)\]$/s);
    if (!SPECIAL.test(typed) || (listed && /^\s*["']/.test(listed[1]))) {
      const names = (listed ? listed[1] : typed).split(/[\s,]+/).map((one) => one.replace(/^["']|["']$/g, ""));
      return { kind: "list", names: names.filter(Boolean) };
    }
    const pattern = typed.replace(/^r?(["'])(.*)\1$/, "$2");
    const objection = disagreement(pattern);
    if (objection) return { kind: "unsure", pattern, reason: objection };
    try {
      return { kind: "regex", pattern, expression: new RegExp(`^(?:${pattern})$`) };
    } catch (error) {
      return { kind: "wrong", pattern, reason: error.message };
    }
  }

  function names(name, chosen) {
    if (chosen.kind === "regex") return chosen.expression.test(name);
    if (chosen.kind === "list") return chosen.names.some((one) => name === one || name.endsWith(`.${one}`));
    return false;
  }

  /* Numbers of layers: `0, 2-4`; null where none are given. */
  function layers(text) {
    const found = [];
    for (const [, from, to] of text.matchAll(/(\d+)(?:\s*-\s*(\d+))?/g)) {
      for (let i = Number(from); i <= Number(to ?? from) && found.length < 10000; i++) found.push(i);
    }
    return found.length ? found : null;
  }

  /* Whether layers_to_transform lets a name pass: it decides about defaults, and about entries of a list that
     are not the whole name. */
  function inLayers(name, target, wanted) {
    if (!wanted || target.kind === "regex" || (target.kind === "list" && target.names.includes(name))) return true;
    const index = name.match(/^.*?\.[^.]*\.(\d+)\./);
    return Boolean(index) && wanted.includes(Number(index[1]));
  }

  /* Which rows are selected, which of them cannot be, and which entries select nothing. */
  function select(rows, target, exclude, wanted = null) {
    const out = { selected: [], refused: [], idle: [] };
    const seen = new Set();
    for (const row of rows) {
      if (seen.has(row.name)) continue;
      seen.add(row.name);
      if (exclude.kind !== "default" && names(row.name, exclude)) continue;
      const chosen = target.kind === "default" ? row.default : names(row.name, target);
      if (chosen && inLayers(row.name, target, wanted)) (row.state === "refused" ? out.refused : out.selected).push(row);
    }
    if (target.kind === "list") {
      out.idle = target.names.filter((one) => !rows.some((row) => names(row.name, { kind: "list", names: [one] })));
    }
    return out;
  }

  function fields(target, exclude, rank, alpha, wanted = null) {
    const value = (chosen) => (chosen.kind === "list" ? chosen.names : chosen.all ? "all-linear" : chosen.kind === "default" ? null : chosen.pattern);
    const found = { r: rank, lora_alpha: alpha };
    if (value(target) !== null) found.target_modules = value(target);
    if (value(exclude) !== null) found.exclude_modules = value(exclude);
    if (wanted && target.kind !== "regex") found.layers_to_transform = wanted;
    return found;
  }

  // A JSON string is a Python string as well, and a YAML one.
  const WRITERS = {
    Python: (found) => `lora_fx.LoraConfig(${Object.entries(found).map(([key, value]) => `${key}=${JSON.stringify(value)}`).join(", ")})`,
    JSON: (found) => JSON.stringify({ peft_type: "LORA", ...found }, null, 2),
    YAML: (found) => Object.entries(found).map(([key, value]) => (Array.isArray(value) ? `${key}:\n${value.map((one) => `  - ${JSON.stringify(one)}`).join("\n")}` : `${key}: ${JSON.stringify(value)}`)).join("\n"),
  };

  return { search, targets, layers, select, fields, WRITERS, isModule };
})();

if (typeof module !== "undefined") module.exports = Find;
