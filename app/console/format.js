// Numbers and times as text, with their units.

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

/** A change of a share, in percentage points, with its sign. */
export function points(change) {
  const text = (100 * change).toFixed(1);
  if (Number(text) === 0) return "0.0 pp";
  return `${change > 0 ? "+" : "−"}${text.replace("-", "")} pp`;
}

/** A value of a neuron, or a statistic of it; null where there is none. */
export function value(number, digits = 3) {
  if (number === null || number === undefined) return "none";
  const size = Math.abs(number);
  const text = size !== 0 && (size >= 10000 || size < 0.001) ? number.toExponential(2) : number.toFixed(digits);
  return text.replace("-", "−");
}

export const range = (low, high) => (low === null || high === null ? "empty" : `${value(low)} to ${value(high)}`);

export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** A Unix time in this browser's time zone. */
export function moment(seconds) {
  const at = new Date(1000 * seconds);
  const today = at.toDateString() === new Date().toDateString();
  const time = at.toLocaleTimeString("en-GB");
  return today ? time : `${at.toLocaleDateString("en-CA")} ${time}`;
}

/** A duration in seconds as text, in its two largest units. */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const parts = [
    [Math.floor(whole / 86400), "d"],
    [Math.floor(whole / 3600) % 24, "h"],
    [Math.floor(whole / 60) % 60, "min"],
    [whole % 60, "s"],
  ];
  const first = parts.findIndex(([number]) => number > 0);
  if (first < 0) return "0 s";
  return parts
    .slice(first, first + 2)
    .filter(([number]) => number > 0)
    .map(([number, unit]) => `${number} ${unit}`)
    .join(" ");
}
