/**
 *
 * FASA
 *
 * What sparse attention does, and the switch between it and dense attention.
 *
 */

/** **FasaStrip** - Of an answer: FASA or dense and why, tokens per second, share of the cache that was read, budget. */
export { default as FasaStrip } from './FasaStrip.svelte';

/** **FasaSwitch** - Chooses FASA or dense attention for what is asked next. Only where the model has a profile. */
export { default as FasaSwitch } from './FasaSwitch.svelte';
