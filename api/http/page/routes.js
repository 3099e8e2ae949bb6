"use strict";
// Draws which experts a text's tokens got, for `molehill explain` and the dashboard.

const bytesOf = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer;
const int16s = (base64) => new Int16Array(bytesOf(base64));
const float32s = (base64) => new Float32Array(bytesOf(base64));

// IEEE 754 half precision: older browsers have no Float16Array. Gate weights are finite.
const float16s = (base64) => Float32Array.from(new Uint16Array(bytesOf(base64)), (bits) => {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
  return bits >> 15 ? -size : size;
});

// root: the document or shadow root that holds the elements of routes.html. data: tokens, of which
// prompt_tokens are the prompt's; sites, each { layer, projection, experts, soft }; and experts and
// weights, arrays of `shape` [tokens, sites, k], -1 where fewer were chosen.
function drawRoutes(root, data) {
  const [numTokens, numSites, k] = data.shape;
  const { experts, weights } = data;
  // Tokens for which no router ran.
  const size = numSites * k;
  const plain = Array.from({ length: numTokens }, (_, t) => experts.subarray(t * size, (t + 1) * size).every((id) => id < 0));
  const numExperts = Math.max(1, ...data.sites.map((site) => site.experts));
  const one = (id) => root.getElementById(id);

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "style") Object.assign(made.style, value);
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  // Neighbouring experts get hues far apart, however many there are.
  const hue = (expert) => (expert * 137.508 + 210) % 360;
  const colour = (expert, alpha = 1) => `hsl(${hue(expert)} 62% 55% / ${alpha})`;
  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 && share > 0 ? 1 : 0)} %`;
  const layers = [...new Set(data.sites.map((site) => site.layer))];
  const projections = [...new Set(data.sites.map((site) => site.projection))];

  // What a token got at some sites: its experts' weights summed and divided by the sites at which a
  // router ran, how often each was chosen, and how many sites were soft.
  function decided(token, chosenSites) {
    const result = { weights: new Float64Array(numExperts), ran: 0, soft: 0, entropy: 0, sets: [] };
    for (const site of chosenSites) {
      const start = (token * numSites + site) * k;
      const chosen = [];
      let total = 0;
      for (let i = start; i < start + k && experts[i] >= 0; ++i) {
        chosen.push(experts[i]);
        total += weights[i];
        result.weights[experts[i]] += weights[i];
      }
      if (plain[token]) continue;
      result.ran += 1;
      result.sets.push(chosen);
      if (data.sites[site].soft && chosen.length === data.sites[site].experts) result.soft += 1;
      if (total <= 0 || data.sites[site].experts < 2) continue;
      for (let i = start; i < start + chosen.length; ++i) {
        const p = weights[i] / total;
        if (p > 0) result.entropy -= (p * Math.log(p)) / Math.log(data.sites[site].experts);
      }
    }
    if (result.ran) {
      result.weights = result.weights.map((weight) => weight / result.ran);
      result.entropy /= result.ran;
    }
    return result;
  }

  function sitesOf(projection, layer) {
    const fits = (site) =>
      (projection === "" || site.projection === projection) && (layer === "" || String(site.layer) === layer);
    return data.sites.map((_, i) => i).filter((i) => fits(data.sites[i]));
  }

  const visible = (text) => (text === "" ? "∅" : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥"));
  let selected = 0;

  function draw() {
    const projection = one("projection").value, layer = one("layer").value;
    const chosenSites = sitesOf(projection, layer);
    const all = Array.from({ length: numTokens }, (_, token) => decided(token, chosenSites));
    const many = chosenSites.length > 1;
    one("explained").textContent = many
      ? `Coloured by the expert with the most weight over ${chosenSites.length} routers. An expert of one router has no more ` +
        "than its number in common with another's."
      : "Coloured by the expert with the most weight; the paler, the less weight it has.";
    drawLegend(all);
    drawTokens(all);
    drawDetail(all);
    drawEntropy(projection);
    drawPairs(all);
  }

  function drawLegend(all) {
    const sums = new Float64Array(numExperts);
    for (const token of all) token.weights.forEach((weight, e) => (sums[e] += weight));
    const total = sums.reduce((a, b) => a + b, 0) || 1;
    const entries = Array.from(sums, (sum, e) =>
      element("span", {}, element("i", { style: { background: colour(e) } }), `expert ${e} · ${percent(sum / total)}`));
    if (data.sites.some((site) => site.soft)) {
      const softly = element("span", { class: "softly" }, element("i"), "soft: all experts, at half of the routers or more");
      entries.push(softly);
    }
    one("legend").replaceChildren(...entries);
  }

  function drawTokens(all) {
    const buttons = data.tokens.slice(0, numTokens).map((text, token) => {
      const { weights: mixed, ran, soft } = all[token];
      const best = mixed.indexOf(Math.max(...mixed));
      const total = mixed.reduce((a, b) => a + b, 0);
      const classes = [];
      if (token >= data.prompt_tokens) classes.push("generated");
      if (!ran) classes.push("nobody");
      if (ran && soft / ran >= 0.5) classes.push("softly");
      const alpha = ran && total > 0 ? 0.12 + 0.68 * (mixed[best] / total) : 0;
      const button = element("button", {
        type: "button", class: classes.join(" "), style: { background: alpha ? colour(best, alpha) : "none" },
        "aria-pressed": String(token === selected), title: alpha ? `expert ${best}, ${percent(mixed[best] / total)}` : "no router ran",
      }, visible(text));
      button.addEventListener("click", () => { selected = token; draw(); });
      return data.tokens[token].includes("\n") ? [button, element("br")] : button;
    }).flat();
    one("tokens").replaceChildren(...buttons);
  }

  function drawDetail(all) {
    const { weights: mixed, ran, soft, entropy, sets } = all[selected] || { weights: [], ran: 0, sets: [] };
    if (!ran) {
      one("detail").textContent = numTokens ? "No router ran for this token: it comes before the invocation." : "";
      return;
    }
    const total = mixed.reduce((a, b) => a + b, 0);
    const order = Array.from(mixed, (weight, e) => [weight, e]).filter(([weight]) => weight > 0).sort((a, b) => b[0] - a[0]);
    const shares = order.map(([weight, e]) => `${e}: ${(weight).toFixed(3)}`).join(" · ");
    const perRouter = sets.reduce((sum, set) => sum + set.length, 0) / ran;
    const bar = element("div", { class: "weights" }, ...order.map(([weight, e]) =>
      element("span", { style: { background: colour(e), width: `${(100 * weight) / total}%` }, title: `expert ${e}` })));
    const softText = soft ? `, soft at ${soft} of ${ran}` : "";
    one("detail").replaceChildren(
      element("div", {}, `Token ${selected}, “${data.tokens[selected]}”: ${perRouter.toFixed(1)} experts a router, entropy ` +
        `${entropy.toFixed(2)}${softText}. Gate weights ${shares}`), bar);
  }

  function drawEntropy(projection) {
    const name = "http://www.w3.org/2000/svg";
    const make = (kind, attributes, text) => {
      const made = document.createElementNS(name, kind);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      if (text !== undefined) made.textContent = text;
      return made;
    };
    const width = 520, height = 232, left = 34, bottom = 40, top = 8;
    const rows = layers.map((layer) => {
      const chosenSites = sitesOf(projection, String(layer));
      const values = Array.from({ length: numTokens }, (_, t) => decided(t, chosenSites)).filter((t) => t.ran).map((t) => t.entropy);
      values.sort((a, b) => a - b);
      const at = (q) => values[Math.min(values.length - 1, Math.floor(q * values.length))] ?? 0;
      return { layer, mean: values.reduce((a, b) => a + b, 0) / (values.length || 1), low: at(0.1), high: at(0.9), is: values.length > 0 };
    }).filter((row) => row.is);
    const x = (i) => left + ((i + 0.5) * (width - left - 6)) / Math.max(1, rows.length);
    const y = (value) => top + (1 - Math.min(1, value)) * (height - top - bottom);
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "mean entropy by layer" });
    for (const value of [0, 0.5, 1]) {
      svg.append(make("line", { class: "grid", x1: left, x2: width, y1: y(value), y2: y(value) }));
      svg.append(make("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value));
    }
    const band = [...rows.map((r, i) => [x(i), y(r.high)]), ...rows.map((r, i) => [x(i), y(r.low)]).reverse()];
    svg.append(make("polygon", { class: "spread", points: band.map((p) => p.join()).join(" ") }));
    svg.append(make("polyline", { class: "mean", points: rows.map((r, i) => `${x(i)},${y(r.mean)}`).join(" ") }));
    const step = Math.ceil(rows.length / 16);
    rows.forEach((row, i) => {
      const dot = make("circle", { cx: x(i), cy: y(row.mean), r: 3 });
      dot.append(make("title", {}, `layer ${row.layer}: ${row.mean.toFixed(3)}`));
      svg.append(dot);
      if (i % step === 0) svg.append(make("text", { x: x(i), y: height - 24, "text-anchor": "middle" }, row.layer));
    });
    svg.append(make("text", { x: width - 4, y: height - 6, "text-anchor": "end" }, "layer; the band has 80 % of the tokens"));
    one("entropy").replaceChildren(svg);
  }

  function drawPairs(all) {
    const counts = Array.from({ length: numExperts }, () => new Float64Array(numExperts));
    let decisions = 0;
    for (const token of all) {
      for (const set of token.sets) {
        decisions += 1;
        for (const a of set) for (const b of set) counts[a][b] += 1;
      }
    }
    const table = element("table", {}, element("tr", {}, element("th"), ...counts.map((_, e) => element("th", {}, String(e)))));
    counts.forEach((row, a) => {
      const cells = Array.from(row, (count, b) => {
        const share = decisions ? count / decisions : 0;
        const cell = element("td", { title: `experts ${a} and ${b}` }, percent(share));
        cell.style.background = a === b ? colour(a, 0.1 + 0.6 * share) : `hsl(212 60% 50% / ${(0.75 * share).toFixed(3)})`;
        return cell;
      });
      table.append(element("tr", {}, element("th", {}, String(a)), ...cells));
    });
    one("pairs").replaceChildren(table);
  }

  const option = (value, text) => element("option", { value }, text);
  one("projection").append(option("", "all"), ...projections.map((p) => option(p, p)));
  one("layer").append(option("", "average over all"), ...layers.map((layer) => option(String(layer), String(layer))));
  for (const id of ["projection", "layer"]) one(id).addEventListener("change", draw);
  draw();
  return { decided, sitesOf };
}
