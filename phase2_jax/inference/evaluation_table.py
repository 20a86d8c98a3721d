"""An evaluation as text for people."""

from typing import Any

_FIGURES = (
    ("Γ mean", "mean_gamma"),
    ("Γ standard deviation", "std_gamma"),
    ("Γ least", "min_gamma"),
    ("Γ greatest", "max_gamma"),
    ("SNR mean", "mean_snr"),
    ("SNR below threshold, share", "low_snr_ratio"),
    ("resonant modes", "num_resonant_modes"),
    ("resonance energy", "total_resonance_energy"),
    ("stable heads, share", "lyapunov_stable_ratio"),
    ("memory energy", "mean_fast_weight_energy"),
)
_LOSSES = (
    ("loss, nats/token", "loss"),
    ("perplexity", "perplexity"),
    ("bits per byte", "bits_per_byte"),
    ("word perplexity", "word_perplexity"),
    ("accuracy", "accuracy"),
)
_LAYERS = (
    ("Γ mean", "gamma_mean"),
    ("Γ least", "gamma_min"),
    ("Γ greatest", "gamma_max"),
    ("SNR", "snr_mean"),
    ("modes", "resonant_modes"),
    ("stable", "stable_ratio"),
    ("energy", "energy"),
)


def table(result: dict[str, Any]) -> str:
    """The result of `evaluate` as lines; a column for each way of reading."""
    readings = {"memory as it is": result}
    if result["memory_off"]:
        readings["memory off"] = result["memory_off"]
    readings |= {f"wiped every {wiped['every']}": wiped for wiped in result["wiped"]}
    head = (
        f"{result['workdir']}, step {result['step']}: {result['tokens']:,} tokens ({result['tokenizer']}) of "
        f"{result['documents']:,} document(s), {result['bytes']:,} bytes, {result['words']:,} words\n"
        f"Text: {result['data']}"
    )
    columns = list(readings.values())
    losses = [[label, *(_number(column[key]) for column in columns)] for label, key in _LOSSES]
    seen = [
        [f"loss, {what} ({result[kind]['tokens']:,} tokens)", *(_number(column[kind]["loss"]) for column in columns)]
        for kind, what in (("seen", "seen earlier in the document"), ("new", "new in the document"))
    ]
    places = [
        [_place(place), f"{place['tokens']:,}", *(_number(column["by_position"][index]["loss"]) for column in columns)]
        for index, place in enumerate(result["by_position"])
    ]
    figures = [[label, *(_number(column[key]) for column in columns)] for label, key in _FIGURES]
    layers = [
        [str(layer), *(_number(result["per_layer"][key][layer]) for _, key in _LAYERS)]
        for layer in range(len(result["per_layer"]["gamma_mean"]))
    ]
    parts = [
        head,
        _columns([["", *readings], *losses, *seen]),
        _columns([["loss at place in document", "tokens", *readings], *places]),
        _columns([["memory", *readings], *figures]),
        _columns([["layer", *(label for label, _ in _LAYERS)], *layers]),
    ]
    rate = result["tokens"] / result["seconds"]
    parts.append(f"{result['seconds']:.1f} s, {rate:,.0f} tokens/s, at most {result['peak_rss_mb']:,.0f} MB of memory")
    return "\n\n".join(parts)


def _place(place: dict[str, Any]) -> str:
    return str(place["first"]) if place["first"] == place["last"] else f"{place['first']:,} to {place['last']:,}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.5g}" if abs(value) < 1e5 else f"{value:.3e}"


def _columns(rows: list[list[str]]) -> str:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
