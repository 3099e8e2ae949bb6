// The two views: adapters, and a prompt's routing.

let view = "adapters";

function showView() {
  $("views").hidden = false;
  $("adapters-view").hidden = view !== "adapters";
  $("prompt-view").hidden = view !== "prompt";
  for (const button of $("views").children) button.setAttribute("aria-pressed", String(button.dataset.view === view));
}

function listAsked(overview) {
  const names = overview.adapters.filter((adapter) => adapter.state === "serving").map((adapter) => adapter.adapter);
  if (names.join("\n") === [...$("asked").options].map((option) => option.value).join("\n")) return;
  const before = $("asked").value || chosen;
  $("asked").replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(before)) $("asked").value = before;
}

async function askRouting(name, text, more) {
  const info = await ask(address(name)), listed = info.routing;
  if (!listed || !listed.sites.length) throw new Error(name + ": no router of it decides anything");
  const body = { model: name, prompt: text, max_tokens: more, temperature: 0, echo: true, logprobs: 0, molehill: { routing: "weights" } };
  const answer = await ask("v1/completions", { method: "POST", body: JSON.stringify(body) }, 600000);
  const [choice] = answer.choices, routed = choice.molehill.routing;
  const sites = listed.sites.map((site) => ({
    layer: site.layer,
    projection: site.head === null ? site.projection : `${site.projection} head ${site.head}`,
    experts: site.experts,
    soft: info.kind === "dynmole",
  }));
  return {
    tokens: choice.logprobs.tokens,
    prompt_tokens: answer.usage.prompt_tokens,
    sites,
    shape: routed.shape,
    experts: int16s(routed.experts),
    weights: float16s(routed.weights),
  };
}

async function showRouting() {
  $("show").disabled = true;
  $("refusal").hidden = $("routes").hidden = true;
  $("asking").textContent = "Asking";
  try {
    const name = $("asked").value, data = await askRouting(name, $("text").value, Number($("more").value));
    const root = $("routes").shadowRoot || $("routes").attachShadow({ mode: "open" });
    root.replaceChildren($("routes-parts").content.cloneNode(true));
    $("routes").hidden = false;
    drawRoutes(root, data);
    $("asking").textContent = `${data.shape[0]} tokens at ${data.shape[1]} routers of ${name}, as the kernels chose`;
  } catch (error) {
    $("asking").textContent = "";
    if (error instanceof Refused) wantKey();
    else refuse(error);
  }
  $("show").disabled = false;
}

function refuse(error) {
  const told = error.answer && error.answer.error && error.answer.error.message;
  $("refusal").textContent = told || error.message || error.name;
  $("refusal").hidden = false;
}

$("views").addEventListener("click", (event) => {
  if (!event.target.dataset.view) return;
  view = event.target.dataset.view;
  showView();
  if (view === "adapters") refresh();
});
$("prompt").addEventListener("submit", (event) => {
  event.preventDefault();
  showRouting();
});
