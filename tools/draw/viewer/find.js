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
    provider: (box, value) => fact(box, "runs on").some((one) => one.startsWith(value)),
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
      return { kind: "list", names: list(typed) ?? [] };
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
    if (chosen.kind === "list") return chosen.names.some((one) => ends(name, one));
    return false;
  }

  const ends = (name, entry) => name === entry || name.endsWith(`.${entry}`);
  const liesIn = (name, module) => name === module || name.startsWith(`${module}.`);

  /* Numbers of layers: `0, 2-4`; null where none are given. */
  function layers(text) {
    const found = [];
    for (const [, from, to] of text.matchAll(/(\d+)(?:\s*-\s*(\d+))?/g)) {
      for (let i = Number(from); i <= Number(to ?? from) && found.length < 10000; i++) found.push(i);
    }
    return found.length ? found : null;
  }

  /* Names that were typed with commas, spaces, brackets or quotes around them; null where there are none. */
  function list(text) {
    const found = text.trim().replace(/^\[(.*)\]$/s, "$1").split(/[\s,]+/).map((one) => one.replace(/^["']|["']$/g, "")).filter(Boolean);
    return found.length ? found : null;
  }

  /* All that was typed, by the name of the field; `objection` says why it cannot be tried here. */
  function asked({ target_modules = "", exclude_modules = "", layers_to_transform = "", layers_pattern = "", modules_to_save = "", target_parameters = "", scope = "" }) {
    const ask = {
      target: targets(target_modules), exclude: targets(exclude_modules), layers: layers(layers_to_transform), patterns: list(layers_pattern),
      saved: list(modules_to_save), parameters: list(target_parameters), scope: list(scope),
    };
    return { ...ask, objection: objectionTo(ask) };
  }

  function objectionTo({ target, exclude, layers: wanted, patterns, saved }) {
    const unsure = (reason) => `Python may read this in another way (${reason}): ask lora-fx plan --why`;
    for (const one of [target, exclude]) {
      if (one.kind === "unsure") return unsure(one.reason);
      if (one.kind === "wrong") return `not an expression: ${one.reason}`;
    }
    for (const entry of [...(patterns ?? []), ...(saved ?? [])]) {
      const odd = disagreement(entry);
      if (odd) return unsure(odd);
      try { RegExp(entry); } catch (error) { return `not an expression: ${error.message}`; }
    }
    if ((wanted || patterns) && (target.kind === "regex" || target.all)) return "layers_to_transform and layers_pattern need a list of names in target_modules";
    return patterns && !wanted ? "layers_pattern needs layers_to_transform" : "";
  }

  /* The number of the layer that a name is in; null where it shows none. */
  function layerOf(name, patterns) {
    const expressions = patterns ? patterns.map((one) => `^(?:^|.*?\\.)${one}\\.(?<idx>\\d+)\\.`) : ["^.*?\\.[^.]*\\.(?<idx>\\d+)\\."];
    for (const expression of expressions) {
      const found = name.match(new RegExp(expression));
      if (found) return Number(found.groups.idx);
    }
    return null;
  }

  /* Whether a module, or one around it, is trained in full: PEFT compares ends without a dot, too. */
  const isSaved = (name, saved) => (saved ?? []).some((one) => new RegExp(`^(?:(^|.*\\.)${one}($|\\..*))`).test(name) || name.endsWith(one) || name.includes(`${one}.`));

  /* Whether a row is selected; which field names it does not matter. */
  function isChosen(row, { target, exclude, layers: wanted, patterns, saved, parameters, scope }) {
    const { name } = row;
    if (scope && !scope.some((one) => liesIn(name, one))) return false;
    // A parameter that is named is adapted whatever is excluded.
    if (parameters?.some((one) => ends(row.weight || `${name}.weight`, one))) return !isSaved(name, saved);
    if (names(name, exclude) || isSaved(name, saved)) return false;
    if (target.kind === "default" ? !(target.all ? row.linear : !parameters && row.default) : !names(name, target)) return false;
    // layers_to_transform decides about defaults, and about entries of a list that are not the whole name.
    const whole = target.kind === "regex" || (target.kind === "list" && target.names.includes(name));
    return whole || !wanted || wanted.includes(layerOf(name, patterns));
  }

  /* Which rows are selected, which of them cannot be, and which entries select nothing. `modules`: all their names. */
  function select(rows, ask, modules = []) {
    const every = [...new Map(rows.map((row) => [row.name, row])).values()], chosen = every.filter((row) => isChosen(row, ask));
    const { target, exclude, parameters, scope, saved, layers: wanted, patterns } = ask;
    const idle = [
      ...(target.names ?? []).filter((one) => !every.some(({ name }) => ends(name, one))), ...(exclude.names ?? []).filter((one) => !every.some(({ name }) => ends(name, one))),
      ...(parameters ?? []).filter((one) => !every.some((row) => ends(row.weight || `${row.name}.weight`, one))),
      ...(scope ?? []).filter((one) => !every.some(({ name }) => liesIn(name, one))),
      ...(saved ?? []).filter((one) => !modules.some((name) => name.endsWith(one))),
      ...(wanted ?? []).filter((one) => !chosen.some(({ name }) => layerOf(name, patterns) === one)).map((one) => `layer ${one}`),
    ];
    return {
      selected: chosen.filter((row) => row.state !== "refused"), refused: chosen.filter((row) => row.state === "refused"), idle,
      inFull: saved ? modules.filter((name) => saved.some((one) => name.endsWith(one))) : [],
    };
  }

  function fields({ target, exclude, layers: wanted, patterns, saved, parameters, scope }, rank, alpha) {
    const value = (chosen) => (chosen.kind === "list" ? chosen.names : chosen.all ? "all-linear" : chosen.kind === "default" ? null : chosen.pattern);
    const found = {
      r: rank, lora_alpha: alpha, target_modules: value(target), exclude_modules: value(exclude), layers_to_transform: wanted, layers_pattern: patterns,
      modules_to_save: saved, target_parameters: parameters, scope,
    };
    return Object.fromEntries(Object.entries(found).filter(([, one]) => one !== null));
  }

  // A JSON string is a Python string as well, and a YAML one.
  const WRITERS = {
    Python: (found) => `lora_fx.LoraConfig(${Object.entries(found).map(([key, value]) => `${key}=${JSON.stringify(value)}`).join(", ")})`,
    JSON: (found) => JSON.stringify({ peft_type: "LORA", ...found }, null, 2),
    YAML: (found) => Object.entries(found).map(([key, value]) => (Array.isArray(value) ? `${key}:\n${value.map((one) => `  - ${JSON.stringify(one)}`).join("\n")}` : `${key}: ${JSON.stringify(value)}`)).join("\n"),
  };

  return { search, asked, select, fields, WRITERS, isModule };
})();

if (typeof module !== "undefined") module.exports = Find;
