// Four threads use one context as an application may: one decodes, the others change settings, read counters and look at
// what was captured. Built with a sanitizer, which says what they do to one another; run by test_threads.py.
//
//   fasa-threads-<sanitizer> MODEL      annotated, tiny, sparse from the first cells on

#include "llama-fasa-eval.h"
#include "llama-fasa.h"

#include "ggml-backend.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

static constexpr int N_PROMPT = 300; // tokens, two micro-batches
static constexpr int N_STEPS  = 40;  // after each prompt
static constexpr int N_ROUNDS = 4;   // prompts, and more until the others have had their turns, but not for ever
static constexpr int N_ROUNDS_MAX = 100;
static constexpr int N_TURNS  = 20;  // of each kind, for each of the others

static void check(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "failed: %s\n", what);
        std::_Exit(1);
    }
}

namespace {

struct application {
    const char    * path;
    llama_model   * model;
    llama_context * ctx;

    std::atomic<bool> is_done = false;

    // turns that the others have had
    std::atomic<int> n_configured = 0;
    std::atomic<int> n_counted    = 0;
    std::atomic<int> n_captured   = 0;
    std::atomic<int> n_refused    = 0; // captures, for the sake of a decode under way

    bool had_turns() const {
        return n_configured >= N_TURNS && n_counted >= N_TURNS && n_captured >= N_TURNS && n_refused >= N_TURNS;
    }

    void decode() {
        for (int round = 0; round < N_ROUNDS || !had_turns(); ++round) {
            check(round < N_ROUNDS_MAX, "every thread has had its turns");
            llama_memory_clear(llama_get_memory(ctx), true);

            std::vector<llama_token> tokens(N_PROMPT);
            for (int i = 0; i < N_PROMPT; ++i) {
                tokens[i] = 3 + 32 + (7*i*i + round) % 95; // printable
            }
            check(llama_decode(ctx, llama_batch_get_one(tokens.data(), N_PROMPT)) == 0, "the prompt is decoded");
            for (int i = 0; i < N_STEPS; ++i) {
                check(llama_decode(ctx, llama_batch_get_one(&tokens[i], 1)) == 0, "a token is decoded");
                check(llama_get_logits(ctx) != nullptr, "there are logits");
                std::this_thread::yield();
            }
        }
        is_done = true;
    }

    void configure() {
        std::mt19937 rng(1);
        while (!is_done) {
            llama_fasa_params params;
            check(llama_fasa_get_params(ctx, &params), "there are settings");

            params.enabled  = rng() % 8 > 0;
            params.exact    = rng() % 2 > 0;
            params.budget   = 32 + rng() % 64;
            params.n_sink   = rng() % 8;
            params.n_recent = rng() % 24;
            params.select   = (llama_fasa_select_type) (rng() % LLAMA_FASA_SELECT_TYPE_COUNT);
            params.policy   = rng() % LLAMA_FASA_POLICY_TYPE_COUNT;
            check(llama_fasa_set_params(ctx, &params), "settings are taken");

            llama_fasa_params found;
            check(llama_fasa_get_params(ctx, &found) && found.budget == params.budget && found.policy == params.policy, "settings are as set");

            n_configured++;
            std::this_thread::yield();
        }
    }

    void count() {
        const size_t tips_size = llama_fasa_tips_size(ctx);

        for (uint64_t n_last = 0; !is_done; ) {
            llama_fasa_stats stats;
            llama_fasa_get_stats(ctx, &stats);
            check(stats.n_steps_prompt + stats.n_steps_decode >= n_last, "counters do not fall");
            n_last = stats.n_steps_prompt + stats.n_steps_decode;
            if (n_last > 100) {
                llama_fasa_reset_stats(ctx);
                n_last = 0;
            }
            check(llama_fasa_tips_size(ctx) == tips_size, "the tips stay where they are");
            check(llama_fasa_min_ctx(ctx) > 0, "there are sparse layers");

            // another profile is of the contexts that come after it
            check(llama_fasa_model_load_profile(model, path, nullptr), "the profile is loaded again");
            check(llama_fasa_model_has_profile(model), "there is a profile");
            check(*llama_fasa_model_override_report(model) == '\0', "there are no overrides");

            n_counted++;
            std::this_thread::yield();
        }
    }

    void capture() {
        static constexpr llama_fasa_capture kinds[] = {
            LLAMA_FASA_CAPTURE_Q, LLAMA_FASA_CAPTURE_K, LLAMA_FASA_CAPTURE_CELLS, LLAMA_FASA_CAPTURE_MASS,
        };
        std::mt19937 rng(2);
        while (!is_done) {
            llama_fasa_set_capture(ctx, rng() % 16);

            for (int i = 0; i < 8; ++i) {
                const int32_t il   = rng() % llama_model_n_layer(model);
                const auto    kind = kinds[rng() % 4];

                int64_t ne[3];
                int     status = llama_fasa_get_capture(ctx, il, kind, ne, nullptr);
                if (status == 1) {
                    std::vector<float> data(ne[0]*ne[1]*ne[2]); // no more: who writes another shape writes behind it
                    status = llama_fasa_get_capture(ctx, il, kind, ne, data.data());
                }
                n_captured += status == 1;
                n_refused  += status == -1;
                std::this_thread::yield();
            }
        }
    }
};

} // namespace

int main(int argc, char ** argv) {
    check(argc == 2, "usage: fasa-threads MODEL");

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_backend_load_all();
    llama_fasa_eval_init();

    auto * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    check(model, "the model is loaded");

    auto params = llama_context_default_params();
    params.n_ctx    = 1024;
    params.n_ubatch = 256;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    // ggml is not built with the sanitizer, which so does not see how its threads wait for one another
    params.n_threads = params.n_threads_batch = 1;

    auto * ctx = llama_init_from_model(model, params);
    check(ctx, "the context is made");

    application app { argv[1], model, ctx };

    std::thread threads[] = {
        std::thread([&] { app.decode();    }),
        std::thread([&] { app.configure(); }),
        std::thread([&] { app.count();     }),
        std::thread([&] { app.capture();   }),
    };
    for (auto & thread : threads) {
        thread.join();
    }
    printf("%d settings, %d counts, %d captures, %d refused\n",
            app.n_configured.load(), app.n_counted.load(), app.n_captured.load(), app.n_refused.load());

    llama_free(ctx);
    llama_model_free(model);

    return 0;
}
