// Phases by two clocks, as times and as shares; gaps, passes, latencies.

import {update} from "../chart.js";
import {button, el} from "../dom.js";
import {empty, figure, inGraphs, isBroken, loading} from "../parts.js";

export async function show(place, {ask, isCurrent}) {
  place.append(loading("Adding up kernels and operators."));
  const answer = await ask("time");
  if (!isCurrent() || isBroken(place, answer)) return;
  const {figures} = answer;
  const cards = [];
  for (const part of ["forward", "recompute", "backward"]) {
    const clocks = ["device", "host"].map((clock) => figures[`${part}-${clock}`]).filter(Boolean);
    cards.push(...clocks.map(stack));
  }
  const rest = ["gaps", "directions", "latency", "latencies", "distinct"].map((key) => figures[key]).filter(Boolean);
  cards.push(...rest.map((spec) => figure(spec)));
  place.replaceChildren();
  if (!answer.has_phases) {
    place.append(answer.in_graphs
      ? empty("The calls ran inside compiled code or CUDA graphs whose kernels are not known, so there are no phases.", inGraphs)
      : empty("The trace has no MoE ranges, so there are no phases.",
        ["Record it with moe_trace.profile, or attach the tracer to your profiler before it starts."]));
  }
  place.append(el("div", {class: "grid"}, ...cards));
  await Promise.all(cards.map((card) => card.drawn));
}

// Stacked times, which a button converts into shares of the call.
function stack(spec) {
  let shares = false;
  const toggle = button("As shares", async () => {
    shares = !shares;
    toggle.setAttribute("aria-pressed", String(shares));
    await update(card.plot, (now) => ({
      ...now,
      layout: {
        ...now.layout,
        barnorm: shares ? "percent" : "",
        yaxis: {...now.layout.yaxis, title: {text: shares ? "% of the call" : "µs a call"}},
      },
    }));
    card.dataset.shares = String(shares);
  }, {"aria-pressed": "false"});
  const card = figure(spec, {tools: [el("div", {class: "tools"}, toggle)]});
  return card;
}
