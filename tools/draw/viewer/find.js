"use strict";
/* Results of a search, and the selection of a configuration. Neither draws, so that both also run outside of a
   browser. */

const Find = (() => {
  const normal = (text) => text.trim().toLowerCase();

  /* `r:8 type:Linear refused q_proj`: all words must match. */
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
    return (isModule(box) && normal(box.fqn).includes(value)) || holds(box, value);
  }

  /* Returns the names of the parameters that a box stands for. */
  const parametersOf = ({ fqn, parameters }) => parameters.map((name) => normal(fqn ? `${fqn}.${name}` : name));

  /* Returns true if a text in lower case is a part of the name of a parameter of a box. The name of the module
     alone does not count. */
  function holds(box, text) {
    const before = box.fqn && box.fqn.length + 1;
    return parametersOf(box).some((name) => {
      const at = name.lastIndexOf(text);
      return at >= 0 && at + text.length > before;
    });
  }

  /* Returns the boxes that match a query. For a name in a folded block it returns the block that is drawn for it,
     and the typed name as `meant`. */
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
    // Names that end with the typed text come before names that continue after it.
    const named = words.filter((word) => !word.key && !STATES[word.value]);
    const exact = found.filter((box) => named.every(({ value }) => [normal(box.fqn), ...parametersOf(box)].some((name) => name.endsWith(value))));
    return { hits: named.length && exact.length ? exact : found, meant };
  }

  /* --- what a configuration selects: PEFT's rules, as lora_fx/config/selection.py has them --- */

  const SPECIAL = /[\\^$*+?()[\]{}|]/;

  /* Returns the reason why an expression may differ in Python, or an empty string. */
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

  /* Parses typed text: nothing (the default), a list of names, or one expression. */
  function targets(text) {
    const typed = text.trim();
    if (!typed) return { kind: "default" };
    if (typed === "all-linear" || typed === '"all-linear"') return { kind: "default", all: true };
    const listed = typed.match(/^\[(.*)\]$/s);
    if (!SPECIAL.test(typed) || (listed && /^\s*(["']|$)/.test(listed[1]))) {
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

  /* Parses numbers of layers: `0, 2-4`. Returns null for none. */
  function layers(text) {
    const found = [];
    for (const [, from, to] of text.matchAll(/(\d+)(?:\s*-\s*(\d+))?/g)) {
      for (let i = Number(from); i <= Number(to ?? from) && found.length < 10000; i++) found.push(i);
    }
    return found.length ? found : null;
  }

  /* Parses names with commas, spaces, brackets or quotes around them. Returns null for none. */
  function list(text) {
    const found = text.trim().replace(/^\[(.*)\]$/s, "$1").split(/[\s,]+/).map((one) => one.replace(/^["']|["']$/g, "")).filter(Boolean);
    return found.length ? found : null;
  }

  /* Returns all typed values by field. `objection` is the reason why they cannot be tried here. */
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

  /* Returns the layer number in a name, or null. */
  function layerOf(name, patterns) {
    const expressions = patterns ? patterns.map((one) => `^(?:^|.*?\\.)${one}\\.(?<idx>\\d+)\\.`) : ["^.*?\\.[^.]*\\.(?<idx>\\d+)\\."];
    for (const expression of expressions) {
      const found = name.match(new RegExp(expression));
      if (found) return Number(found.groups.idx);
    }
    return null;
  }

  /* Returns true if a module, or one around it, is trained in full. PEFT also compares ends without a dot. */
  const isSaved = (name, saved) => (saved ?? []).some((one) => new RegExp(`^(?:(^|.*\\.)${one}($|\\..*))`).test(name) || name.endsWith(one) || name.includes(`${one}.`));

  /* Returns true if a name is selected. `row`: the operation's data for the default. */
  function isChosen(name, row, { target, exclude, layers: wanted, patterns, saved, parameters, scope }) {
    if (scope && !scope.some((one) => liesIn(name, one))) return false;
    if (names(name, exclude) || isSaved(name, saved)) return false;
    if (target.kind === "default" ? !(target.all ? row.linear : !parameters && row.default) : !names(name, target)) return false;
    // layers_to_transform applies to defaults, and to entries of a list that are not the whole name.
    const whole = target.kind === "regex" || (target.kind === "list" && target.names.includes(name));
    return whole || !wanted || wanted.includes(layerOf(name, patterns));
  }

  /* Returns some output features of a fused weight as a separate operation. */
  function part(row, name, start, stop) {
    const lost = row.width - (stop - start);
    const each_rank = row.each_rank && row.each_rank - lost, fixed = (row.fixed * (stop - start)) / row.width;
    return { ...row, name: `${row.name}.${name}`, of: row, rows: [start, stop], each_rank, fixed, asked: [`${row.name}.${name}`] };
  }

  /* Returns the parts of a row that a list names by their output features: qkv.0_64. */
  function numbered(row, { target }) {
    return (target.names ?? []).flatMap((entry) => {
      const [, name, start, stop] = entry.match(/^(.+)\.(\d+)_(\d+)$/) ?? [];
      if (!name || !ends(row.name, name)) return [];
      return [part(row, `${start}_${stop}`, Number(start), Number(stop))];
    });
  }

  /* Returns the operations of a row that a configuration selects: the row itself, or some of its parts. `asked`: the
     names by which ranks are looked up. The rules are those of lora_fx/passes/plan/choice.py. */
  function chosen(row, ask) {
    const { target, exclude, parameters, saved, scope } = ask, weight = row.weight || `${row.name}.weight`;
    // "all-linear" gives some experts twice the rank.
    const yes = (one, asked = [one.name]) => [{ ...one, asked, times: target.all ? one.linear : 1 }];
    // A named parameter is adapted even if it is excluded.
    const named = parameters?.some((one) => ends(weight, one)) && (!scope || scope.some((one) => liesIn(weight, one)));
    if (named) return isSaved(row.name, saved) ? [] : yes(row, [weight]);
    const whole = isChosen(row.name, row, ask), excluded = (name) => names(name, exclude);
    if (row.width) {
      const parts = row.parts.map((one) => part(row, ...one));
      if (whole && parts.some(({ name }) => excluded(name))) return parts.filter(({ name }) => !excluded(name));
      if (!whole && target.kind !== "default" && !excluded(row.name)) {
        const own = numbered(row, ask), same = (one) => own.some(({ rows }) => String(rows) === String(one.rows));
        const found = [...parts.filter((one) => !same(one)), ...own].filter(({ name }) => isChosen(name, row, ask));
        if (found.length) return found;
      }
    }
    if (whole) return yes(row);
    const layer = row.attention && target.kind !== "default" && !excluded(row.name) && isChosen(row.attention, row, ask);
    return layer ? yes(row, [row.name, row.attention]) : [];
  }

  /* Returns the reason why parts of a fused weight cannot be adapted, or an empty string. */
  function clash(found) {
    for (const one of found.filter(({ rows }) => rows)) {
      const [start, stop] = one.rows, { of } = one;
      if (start >= stop || stop > of.width) return `${of.name} has the rows 0 to ${of.width}, written start_stop as in a slice`;
      const other = found.find((two) => two !== one && two.of === of && two.rows[0] < stop && start < two.rows[1]);
      if (other) return `rows of ${of.name} that overlap: ${one.rows.join("_")} and ${other.rows.join("_")}; a row has one adapter`;
    }
    return "";
  }

  /* Returns the selected rows, those that cannot be adapted, and entries without a match. `modules`: all their names. */
  function select(rows, given, modules = [], heads = []) {
    const ask = heads.length ? { ...given, saved: [...(given.saved ?? []), ...heads] } : given, found = rows.flatMap((row) => chosen(row, ask));
    const { target, exclude, parameters, scope, saved, layers: wanted, patterns } = ask;
    const every = [...new Set([...rows, ...found].flatMap((row) => [row.name, ...(row.rows ? [] : row.parts.map(([name]) => `${row.name}.${name}`)), row.attention]))].filter((one) => one !== "");
    const kept = new Set(found.flatMap((row) => [row.name, ...row.asked])), has = (one) => every.some((name) => ends(name, one));
    const idle = [
      ...(target.names ?? []).filter((one) => !has(one)), ...(exclude.names ?? []).filter((one) => !has(one)),
      ...(parameters ?? []).filter((one) => !rows.some((row) => ends(row.weight || `${row.name}.weight`, one))),
      ...(scope ?? []).filter((one) => !every.some((name) => liesIn(name, one))),
      ...(given.saved ?? []).filter((one) => !modules.some((name) => name.endsWith(one))),
      ...(wanted ?? []).filter((one) => !found.some(({ name }) => layerOf(name, patterns) === one)).map((one) => `layer ${one}`),
    ];
    const left = (target.names ?? []).filter((one) => has(one) && ![...kept].some((name) => ends(name, one)));
    return {
      selected: found.filter((row) => !row.reason), refused: found.filter((row) => row.reason), idle, left, clash: clash(found),
      inFull: saved ? modules.filter((name) => saved.some((one) => name.endsWith(one))) : [],
    };
  }

  /* Returns the rank of a selected row, by its first name that matches a pattern. */
  function rankOf(row, rank, patterns = {}) {
    for (const name of row.asked) {
      const key = Object.keys(patterns).find((one) => new RegExp(`^(?:(.*\\.)?(${one})$)`).test(name)) ?? name;
      if (Object.hasOwn(patterns, key)) return patterns[key];
    }
    return rank;
  }

  /* Returns the number of elements that a selected row trains. */
  const costOf = (row, rank, patterns) => row.fixed + row.each_rank * rankOf(row, rank, patterns) * (row.times || 1);

  /* `rest`: fields that cannot be typed into the page. */
  function fields({ target, exclude, layers: wanted, patterns, saved, parameters, scope }, rank, alpha, rest = {}) {
    const value = (chosen) => (chosen.kind === "list" ? chosen.names : chosen.all ? "all-linear" : chosen.kind === "default" ? null : chosen.pattern);
    const found = {
      r: rank, lora_alpha: alpha, target_modules: value(target), exclude_modules: value(exclude), layers_to_transform: wanted, layers_pattern: patterns,
      modules_to_save: saved, target_parameters: parameters, scope,
    };
    return { ...Object.fromEntries(Object.entries(found).filter(([, one]) => one !== null)), ...rest };
  }

  /* Returns a JSON value in Python's notation. */
  function python(value) {
    if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
    if (value && typeof value === "object") return `{${Object.entries(value).map(([key, one]) => `${JSON.stringify(key)}: ${python(one)}`).join(", ")}}`;
    return value === true ? "True" : value === false ? "False" : value === null ? "None" : JSON.stringify(value);
  }

  // A JSON string is also a valid Python and YAML string.
  const WRITERS = {
    Python: (found) => `lora_fx.LoraConfig(${Object.entries(found).map(([key, value]) => `${key}=${python(value)}`).join(", ")})`,
    JSON: (found) => JSON.stringify({ peft_type: "LORA", ...found }, null, 2),
    YAML: (found) => Object.entries(found).map(([key, value]) => (Array.isArray(value) ? `${key}:\n${value.map((one) => `  - ${JSON.stringify(one)}`).join("\n")}` : `${key}: ${JSON.stringify(value)}`)).join("\n"),
  };

  return { search, asked, select, costOf, disagreement, fields, WRITERS, isModule, holds };
})();

if (typeof module !== "undefined") module.exports = Find;
