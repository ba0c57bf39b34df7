#pragma once

#include "llama-fasa.h"
#include "llama-fasa-chooser.h"
#include "llama-fasa-profile.h"
#include "llama-fasa-rope.h"

#include <memory>
#include <mutex>
#include <optional>

struct llama_context;
struct llama_cparams;
struct llama_ubatch;

class llama_fasa_graph_input;

// What a llama_context knows of FASA; the graph reaches it through cparams.
//
// A run is what llama_decode or llama_encode does with graphs. Nothing that these look at changes meanwhile: other
// threads leave what they want for the next run, and see what was counted, under a lock.
struct llama_fasa_context {
    explicit llama_fasa_context(std::shared_ptr<const llama_fasa_profile> profile);

    const std::shared_ptr<const llama_fasa_profile> profile; // nullptr: calibration of a model without one; may have no chunks

    //
    // of the thread that runs
    //

    llama_fasa_params params  = {};
    uint32_t          capture = 0; // enum llama_fasa_capture

    // whether a micro-batch is part of a prompt: the caller says so, or it has more tokens of one sequence than a decode step
    bool is_prompt(const llama_ubatch & ubatch) const;

    // who chooses, as params.policy says
    llama_fasa_chooser & chooser() { return other ? *other : own; }

    bool reads_prompt = false; // as the caller says

    bool logged[LLAMA_FASA_REASON_COUNT] = {};
    bool logged_exact = false;
    bool logged_prompt_mass = false;

    // of the graph that ran last in this run, or in the one before
    const llama_fasa_graph_input * last_run = nullptr;

    // true: the settings are others than in the run before
    bool begin_run();
    void end_run();

    void count(const llama_fasa_stats & step);

    //
    // of any thread
    //

    llama_fasa_params get_params() const; // those of the next run
    void set_params(const llama_fasa_params & params);
    void set_capture(uint32_t what);
    void set_prompt(bool prompt);

    llama_fasa_stats get_stats() const;
    void reset_stats();

    // as llama_fasa_get_capture
    enum capture_status { CAPTURE_STATUS_FOUND, CAPTURE_STATUS_NONE, CAPTURE_STATUS_RUNNING, CAPTURE_STATUS_CHANGED };
    capture_status get_capture(const llama_context & ctx, int32_t il, llama_fasa_capture which, int64_t ne[3], void * dst) const;

    // of the keys captured last; nothing: they were not, or a run goes on
    std::optional<llama_fasa_rope> get_rope(int32_t il) const;

private:
    llama_fasa_chooser                  own;   // FASA
    std::unique_ptr<llama_fasa_chooser> other; // nullptr: all settings so far have named FASA

    mutable std::mutex mutex; // of all that follows, and of the transition from one run to the next

    bool is_running  = false;
    bool next_prompt = false;

    std::optional<llama_fasa_params> next_params;
    std::optional<uint32_t>          next_capture;

    llama_fasa_stats stats = {};
};

// a run, as long as it lives
class llama_fasa_run {
public:
    // cparams: through which the graph finds the context, if there is a profile or something is captured
    llama_fasa_run(llama_fasa_context & fasa, llama_cparams & cparams);
    ~llama_fasa_run() { fasa.end_run(); }

    llama_fasa_run(const llama_fasa_run &) = delete;
    llama_fasa_run & operator=(const llama_fasa_run &) = delete;

private:
    llama_fasa_context & fasa;
};
