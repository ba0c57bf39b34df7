/** What llama-server says of FASA: settings in /props, counters in an answer's timings. */

export interface FasaSettings {
	/** whether the model has a profile, without which it decodes dense */
	profile: boolean;
	enabled: boolean;
	/** cells that a decoded token attends to in each sparse layer, of up to fasa.budget_ctx */
	budget: number;
}

/** gathered from the numbers of timings whose names begin with fasa_ */
export interface FasaTimings {
	/** layers summed over steps, here and below */
	n_layers_sparse: number;
	/** by reason */
	n_layers_dense: Record<string, number>;
	/** bytes that attention read for decoded tokens, over what dense attention would have read */
	read_ratio: number;
	/** cells that a decoded token attended to in each sparse layer, of up to fasa.budget_ctx; 0: it was dense */
	budget: number;
}
