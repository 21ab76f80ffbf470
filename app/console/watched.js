// A value that parts of the page follow.

export class Watched {
  #value;
  #watchers = new Set();

  constructor(value) {
    this.#value = value;
  }

  get value() {
    return this.#value;
  }

  set value(value) {
    this.#value = value;
    for (const watcher of [...this.#watchers]) if (this.#watchers.has(watcher)) watcher(value); // one may end another
  }

  /** Call `watcher` with every new value until `signal` is aborted. */
  watch(watcher, signal) {
    this.#watchers.add(watcher);
    signal?.addEventListener("abort", () => this.#watchers.delete(watcher));
  }
}
