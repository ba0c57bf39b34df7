/**
 * fasaStore - FASA (Frequency-Aware Sparse Attention) in the server
 *
 * Holds the choice between dense attention and FASA, which goes into every request, and
 * what the last request asked for. The choice is the server's until it is made, and again
 * after a reload: nothing slow or inexact is left behind unseen.
 */

import { serverStore } from './server.svelte';
import type { FasaSettings, FasaTimings } from '$lib/types/fasa';

class FasaStore {
	private budget: number | undefined;
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
	request(body: { fasa_budget?: number; fasa_enabled?: boolean }): void {
		if (this.available && this.choice !== null) body.fasa_enabled ??= this.choice;

		this.budget = body.fasa_budget ?? this.settings?.budget;
	}

	/** Adds to the counters of an answer what its request asked for, to be stored with them. */
	answer(timings: { fasa?: FasaTimings }): void {
		if (timings.fasa) timings.fasa.budget ??= this.budget;
	}
}

export const fasaStore = new FasaStore();
