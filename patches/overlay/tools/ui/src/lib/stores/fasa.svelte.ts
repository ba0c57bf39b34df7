/**
 * fasaStore - FASA (Frequency-Aware Sparse Attention) in the server
 *
 * Holds the choice between dense attention and FASA, which goes into every request.
 * It is the server's until it is made, and again after a reload: nothing slow or inexact is left behind unseen.
 */

import { serverStore } from './server.svelte';
import type { FasaSettings, FasaTimings } from '$lib/types/fasa';

const DENSE = 'fasa_n_layers_dense_'; // a reason follows

class FasaStore {
	private choice = $state<boolean | null>(null);

	/** Whether there is anything to choose: the model has a profile. */
	get available(): boolean {
		return this.settings?.profile === true;
	}

	get enabled(): boolean {
		return this.choice ?? this.settings?.enabled === true;
	}

	set enabled(enabled: boolean) {
		this.choice = enabled;
	}

	private get settings(): FasaSettings | null | undefined {
		return serverStore.props?.fasa;
	}

	/** Writes the choice into a request, unless that has settings of its own (custom JSON). */
	request(body: { fasa_enabled?: boolean }): void {
		if (this.available && this.choice !== null) body.fasa_enabled ??= this.choice;
	}

	/** Gathers the counters of an answer. */
	answer(timings: { fasa?: FasaTimings }): void {
		const counters = timings as unknown as Record<string, number>;

		if (!('fasa_read_ratio' in counters)) return;

		timings.fasa = {
			n_layers_sparse: counters.fasa_n_layers_sparse,
			n_layers_dense: Object.fromEntries(
				Object.entries(counters)
					.filter(([name]) => name.startsWith(DENSE))
					.map(([name, n]) => [name.slice(DENSE.length), n])
			),
			read_ratio: counters.fasa_read_ratio,
			budget: counters.fasa_budget
		};
	}
}

export const fasaStore = new FasaStore();
