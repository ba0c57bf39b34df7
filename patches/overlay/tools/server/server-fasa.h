// FASA in the server: settings of a request, counters of a request and of all.

#pragma once

#include "json.h"
#include "llama-fasa.h"

#include <string>

// what some steps did, and with which settings
struct server_fasa_steps {
    llama_fasa_stats stats  = {};
    int32_t          budget = 0; // 0: FASA is off, or the model has no profile
};

// counters of some steps, by the names that they have in Python (fasa_edge.FasaStats)
struct server_fasa_stats {
    llama_fasa_stats sum = {};

    int32_t budget   = 0;     // of the latest
    bool    is_shown = false; // also before the first step

    void add(const server_fasa_steps & steps);

    bool empty() const; // nothing to show: nothing ran where FASA could

    common_json to_json() const;
    void        add_to_timings(common_json & timings) const; // flat, since clients take each of them for a number
    std::string to_metrics() const; // Prometheus
};

// what a request sets in place of the server's settings; once it has a slot: what is in force for it
struct server_fasa_request {
    int32_t budget  = 0;  // 0: the server's, or the model has no profile
    int32_t enabled = -1; // -1: the server's

    bool operator==(const server_fasa_request & other) const { return budget == other.budget && enabled == other.enabled; }
    bool operator!=(const server_fasa_request & other) const { return !(*this == other); }
};

// Settings are of the context, so all of a batch have the same. Requests with different ones take turns, batch by batch.
class server_fasa {
public:
    bool init(llama_context * ctx_of_model); // whether the model has settings of FASA

    // gives a request the server's settings where it has none
    // why the model cannot do what it wants; "": it can
    std::string complete(server_fasa_request & request) const;

    // of requests that set nothing
    server_fasa_request defaults() const;

    // the settings of the next batch: others than those of the last one, where slots wait that have them
    template <typename Slots>
    const server_fasa_request & take_turn(const Slots & slots) {
        for (size_t i = 1; i <= slots.size(); ++i) {
            const size_t at   = (turn_slot + i) % slots.size();
            const auto & slot = slots[at];
            if (slot.is_processing() && slot.task && slot.task->params.fasa != turn) {
                turn_slot = at;
                turn      = slot.task->params.fasa;
                break;
            }
        }
        return turn;
    }

    // how many of n_tokens from off on go into one llama_decode: beside a part of a prompt, generated tokens would be dense
    template <typename Tokens>
    int32_t n_together(const Tokens & tokens, int32_t off, int32_t n_tokens) const {
        if (!turn.enabled) {
            return n_tokens;
        }
        int32_t n = 1;
        while (n < n_tokens && tokens[off + n].is_prompt == tokens[off].is_prompt) {
            ++n;
        }
        return n;
    }

    // around llama_decode, also of an image; is_prompt: the batch holds a part of a prompt, however short
    void              begin(bool is_prompt);
    server_fasa_steps end();

    common_json settings() const; // the server's own; null: the model has no profile

private:
    llama_context *     ctx = nullptr;
    bool                has_profile = false;
    bool                has_params  = false;
    llama_fasa_params   params = {}; // the server's
    server_fasa_request turn;
    server_fasa_request applied;
    size_t              turn_slot = 0;
    llama_fasa_stats    before = {};
};
