// The page of `molehill explain`.
const given = JSON.parse(document.getElementById("routing").textContent);
const data = { ...given, experts: int16s(given.experts), weights: float32s(given.weights) };
document.getElementById("title").textContent = `${data.adapter} on ${data.model}`;
document.getElementById("origin").textContent = data.origin;
document.title = `Routing of ${data.adapter}`;
const routes = drawRoutes(document, data);
