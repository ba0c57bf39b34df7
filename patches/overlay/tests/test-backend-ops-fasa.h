// Test cases of the FASA ops, included by test-backend-ops.cpp.

#pragma once

#include "test-backend-ops-fasa-attend.h"
#include "test-backend-ops-fasa-select.h"

// shapes that nobody thought of
static void add_test_cases_fasa_fuzz(std::vector<std::unique_ptr<test_case>> & test_cases) {
    static const ggml_type types_KV[] = {
        GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,  GGML_TYPE_Q4_0,
        GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL,
    };

    std::mt19937 rng;
    const auto random  = [&](int64_t min, int64_t max) { return fasa_random(rng, min, max); };
    const auto hs      = [&] { return std::array<int64_t, 5>{ 64, 80, 96, 128, 256 }[random(0, 4)]; };
    const auto type_KV = [&](int64_t hs) {
        const ggml_type type = types_KV[random(0, 8)];
        return hs % ggml_blck_size(type) == 0 ? type : GGML_TYPE_F16;
    };
    const auto hidden  = [&] { return std::array<int64_t, 6>{ 0, 10, 10, 50, 97, 100 }[random(0, 5)]; };

    for (int i = 0; i < 200; ++i) {
        const int64_t hsk = hs();
        const int64_t nh  = random(1, 3);
        const std::array<int64_t, 2> nr23 = { random(1, 16), random(1, 2) };
        const int64_t kv       = 32*random(1, 8);
        const int64_t nb       = random(1, 3);
        const int64_t n_dim    = random(0, 1) ? 16 + hsk/8 : 2*random(1, hsk/2);
        const int64_t n_fac    = random(1, kv);
        const int64_t n_forced = random(0, std::min<int64_t>(n_fac, 12));
        const int64_t n_store  = random(0, 3) ? 0 : random(1, kv);
        const int64_t n_hidden = hidden();
        const ggml_type type_k = types_KV[random(0, 2)];
        const bool by_head = random(0, 3) == 0;
        const bool cached  = random(0, 1);
        test_cases.emplace_back(new test_fasa_select(hsk, nh, nr23, kv, nb, n_dim, n_fac, n_forced, n_store, n_hidden, type_k, by_head, cached));
    }

    for (int i = 0; i < 300; ++i) {
        const int64_t hsk = hs();
        const int64_t hsv = random(0, 2) ? hsk : hs();
        const int64_t nh  = random(1, 3);
        const std::array<int64_t, 2> nr23 = { random(1, 16), random(1, 2) };
        const int64_t kv    = random(1, 160);
        const int64_t nb    = random(1, 3);
        const int64_t n_fac = random(0, 2) ? random(1, kv) : 0;
        const bool    sinks = random(0, 1);
        const float   logit_softcap = random(0, 1) ? 0.0f : random(3, 30);
        const ggml_type type_K = type_KV(hsk);
        const ggml_type type_V = type_KV(hsv);
        const int64_t n_hidden = hidden();
        const bool by_head = n_fac && random(0, 3) == 0;
        test_cases.emplace_back(new test_fasa_attend(hsk, hsv, nh, nr23, kv, nb, n_fac, sinks, logit_softcap, type_K, type_V, n_hidden, by_head));
    }
}

// all cells for many tokens
static void add_test_cases_fasa_prompt(std::vector<std::unique_ptr<test_case>> & test_cases) {
    for (std::array<int64_t, 2> nr23 : { std::array<int64_t, 2>{ 1, 1 }, { 3, 2 }, { 7, 1 } }) {
        for (int64_t hidden : { 0, 10, 97 }) {
            test_cases.emplace_back(new test_fasa_attend( 64,  64, 2, nr23, 301, 35, 0, false, 0.0f, GGML_TYPE_F16, GGML_TYPE_F16, hidden));
            test_cases.emplace_back(new test_fasa_attend(128,  96, 1, nr23, 200, 24, 0, true,  5.0f, GGML_TYPE_F16, GGML_TYPE_F16, hidden));
        }
    }
    for (ggml_type type_KV : { GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL }) {
        test_cases.emplace_back(new test_fasa_attend(64, 64, 2, { 4, 1 }, 130, 33, 0, false, 0.0f, type_KV, type_KV));
    }
    for (int64_t n_inf : { 100, 200 }) {
        test_cases.emplace_back(new test_fasa_attend(64, 64, 2, { 4, 2 }, 200, 30, 0, true, 0.0f, GGML_TYPE_F16, GGML_TYPE_F16, 10, false, n_inf));
    }
}

// blocks of cells for many tokens
static void add_test_cases_fasa_blocks(std::vector<std::unique_ptr<test_case>> & test_cases) {
    for (std::array<int64_t, 2> nr23 : { std::array<int64_t, 2>{ 1, 1 }, { 3, 2 }, { 7, 1 } }) {
        for (float mass : { 0.9f, 1.0f }) {
            for (int64_t hidden : { 0, 30 }) {
                test_cases.emplace_back(new test_fasa_attend_blocks( 64,  64, 2, nr23,  992, 100, 24, mass, false, 0.0f, GGML_TYPE_F16, hidden));
                test_cases.emplace_back(new test_fasa_attend_blocks(128,  96, 1, nr23, 1216,  30, 48, mass, true,  5.0f, GGML_TYPE_F16, hidden));
            }
        }
    }
    for (ggml_type type_KV : { GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL }) {
        test_cases.emplace_back(new test_fasa_attend_blocks(64, 64, 2, { 4, 1 }, 768, 33, 24, 0.9f, true, 0.0f, type_KV));
    }
    test_cases.emplace_back(new test_fasa_attend_blocks(80, 80, 4, { 1, 3 }, 544, 2, 26, 0.9f));
}

static void add_test_cases_fasa_decode(std::vector<std::unique_ptr<test_case>> & test_cases) {
    for (int64_t nb : { 1, 3 }) {
        for (std::array<int64_t, 2> nr23 : { std::array<int64_t, 2>{ 1, 1 }, { 3, 1 }, { 7, 2 }, { 12, 1 } }) {
            for (bool by_head : { false, true }) {
                test_cases.emplace_back(new test_fasa_decode( 64, 2, nr23,  512, nb, 24,  100, 12, false, 0.0f, GGML_TYPE_F16, GGML_TYPE_F16, 10, by_head));
                test_cases.emplace_back(new test_fasa_decode(128, 1, nr23, 1056, nb, 32,  256, 0, true,  5.0f, GGML_TYPE_F16, GGML_TYPE_F16, 10, by_head));
            }
            test_cases.emplace_back(new test_fasa_decode(256, 1, nr23, 256, nb, 48, 256, 1));
            test_cases.emplace_back(new test_fasa_decode( 80, 1, nr23, 512, nb, 26,  64, 5));
            test_cases.emplace_back(new test_fasa_decode( 64, 1, nr23, 512, nb, 24,  64, 5, false, 0.0f, GGML_TYPE_F16, GGML_TYPE_F16, 10, false, true));
        }
    }
    for (ggml_type type_K : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (ggml_type type_V : { GGML_TYPE_F16, GGML_TYPE_Q8_0, type_K }) {
            test_cases.emplace_back(new test_fasa_decode(64, 2, { 4, 1 }, 512, 1, 24, 100, 12, false, 0.0f, type_K, type_V));
        }
    }
    for (int64_t hidden : { 0, 97, 100 }) {
        test_cases.emplace_back(new test_fasa_decode(64, 2, { 4, 1 }, 512, 2, 24, 100, 12, true, 0.0f, GGML_TYPE_F16, GGML_TYPE_F16, hidden));
    }
    // scores that no shared memory holds; more candidates than threads
    test_cases.emplace_back(new test_fasa_decode(64, 2, { 4, 1 }, 66080, 1, 24, 700, 36));
    test_cases.emplace_back(new test_fasa_decode(64, 1, { 4, 1 },  8192, 1, 24, 1000, 36, false, 0.0f, GGML_TYPE_F16, GGML_TYPE_F16, 10, false, true));
    test_cases.emplace_back(new test_fasa_decode(64, 1, { 1, 1 },  8192, 1, 24, 5000, 36));
}

static void add_test_cases_fasa_eval(std::vector<std::unique_ptr<test_case>> & test_cases) {
    for (int64_t nb : { 1, 4 }) {
        for (std::array<int64_t, 2> nr23 : { std::array<int64_t, 2>{ 1, 1 }, { 3, 1 }, { 8, 2 } }) {
            for (int64_t n_fac : { 1, 64, 256 }) {
                test_cases.emplace_back(new test_fasa_select( 64, 3, nr23,  256, nb,  24, n_fac));
                test_cases.emplace_back(new test_fasa_select(128, 2, nr23, 1024, nb,  32, n_fac, std::min<int64_t>(n_fac, 12)));
                test_cases.emplace_back(new test_fasa_select( 80, 1, nr23,  288, nb,  26, n_fac));
                test_cases.emplace_back(new test_fasa_select( 64, 2, nr23,  256, nb,  64, n_fac, 1));
            }
            for (int64_t n_store : { 1, 7, 100 }) {
                test_cases.emplace_back(new test_fasa_store( 64, 3, nr23, 256, nb, 24,  64, 0, n_store));
                test_cases.emplace_back(new test_fasa_store(128, 2, nr23, 512, nb, 32, 200, 0, n_store));
            }
        }
    }
    for (ggml_type type_k : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
        for (int64_t n_store : { 0, 1, 100 }) {
            test_cases.emplace_back(new test_fasa_store( 80, 3, { 3, 2 }, 256, 2, 26, 64, 0, n_store, 10, type_k, false, true));
        }
    }

    for (int64_t nb : { 1, 4 }) {
        for (std::array<int64_t, 2> nr23 : { std::array<int64_t, 2>{ 1, 1 }, { 3, 1 }, { 8, 2 } }) {
            for (bool sinks : { false, true }) {
                for (float logit_softcap : { 0.0f, 5.0f }) {
                    test_cases.emplace_back(new test_fasa_attend( 64,  64, 3, nr23, 256, nb,   1, sinks, logit_softcap));
                    test_cases.emplace_back(new test_fasa_attend(128, 128, 2, nr23, 512, nb, 300, sinks, logit_softcap));
                    test_cases.emplace_back(new test_fasa_attend( 80,  80, 1, nr23,  96, nb,  96, sinks, logit_softcap));
                    test_cases.emplace_back(new test_fasa_attend(192, 128, 2, nr23, 256, nb,  64, sinks, logit_softcap));
                    test_cases.emplace_back(new test_fasa_attend( 64,  64, 3, nr23, 257, nb,   0, sinks, logit_softcap));
                }
            }
        }
    }

    // more cells than heads: what can only be shared out by cells
    for (ggml_type type_KV : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (int64_t n_fac : { 0, 4097 }) {
            for (std::array<int64_t, 2> nr23 : { std::array<int64_t, 2>{ 1, 1 }, { 7, 1 } }) {
                test_cases.emplace_back(new test_fasa_attend( 64,  64, 1, nr23, 5003, 1, n_fac, true,  0.0f, type_KV, type_KV));
                test_cases.emplace_back(new test_fasa_attend(128, 128, 1, nr23, 4999, 1, n_fac, false, 0.0f, type_KV, type_KV));
            }
        }
    }
    test_cases.emplace_back(new test_fasa_select( 64, 1, { 1, 1 }, 8192, 1, 24, 512, 12));
    test_cases.emplace_back(new test_fasa_select(128, 1, { 7, 1 }, 8192, 1, 32, 512, 12));
    // so long that what works on a part of the cells has to take several turns
    test_cases.emplace_back(new test_fasa_select( 64, 1, { 4, 1 }, 66080, 1, 24, 700, 12));
    test_cases.emplace_back(new test_fasa_select( 64, 1, { 1, 1 }, 66080, 2, 24, 700, 12, 3000));

    // logits of -INFINITY, of all cells of a thread or of all; scores that f32 would not hold
    for (ggml_type type_K : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
        for (int64_t n_fac : { 0, 400 }) {
            for (int64_t n_inf : { 300, 600 }) {
                for (bool sinks : { false, true }) {
                    test_cases.emplace_back(new test_fasa_attend(64, 64, 2, { 4, 2 }, 600, 2, n_fac, sinks, 0.0f, type_K, GGML_TYPE_F16, 10, false, n_inf));
                }
            }
        }
    }
    for (int exponent : { -60, 60, 120 }) {
        test_cases.emplace_back(new test_fasa_select(64, 2, { 4, 2 }, 1024, 2, 24, 200, 12, 0, 10, GGML_TYPE_F16, true, false, ldexpf(1.0f, exponent)));
        test_cases.emplace_back(new test_fasa_select(64, 2, { 1, 1 }, 1024, 1, 24, 950,  0, 0, 10, GGML_TYPE_F16, false, false, ldexpf(1.0f, exponent)));
    }

    add_test_cases_fasa_prompt(test_cases);
    add_test_cases_fasa_blocks(test_cases);
    add_test_cases_fasa_decode(test_cases);
    add_test_cases_fasa_fuzz(test_cases);
}

static void add_test_cases_fasa_perf(std::vector<std::unique_ptr<test_case>> & test_cases) {
    // one decoded token of SmolLM2-135M and of Llama-3-8B
    for (int64_t kv : { 4096, 32768 }) {
        test_cases.emplace_back(new test_fasa_store ( 64, 3, { 3, 1 }, kv, 1, 24, 512, 0, 1));
        test_cases.emplace_back(new test_fasa_store (128, 8, { 4, 1 }, kv, 1, 32, 512, 0, 1));
        test_cases.emplace_back(new test_fasa_store (128, 8, { 4, 1 }, kv, 1, 32, 512, 0, 1, 10, GGML_TYPE_F16, false, true));
        test_cases.emplace_back(new test_fasa_select( 64, 3, { 3, 1 }, kv, 1, 24, 512));
        test_cases.emplace_back(new test_fasa_select(128, 8, { 4, 1 }, kv, 1, 32, 512));
        test_cases.emplace_back(new test_fasa_attend( 64,  64, 3, { 3, 1 }, kv, 1, 512));
        test_cases.emplace_back(new test_fasa_attend(128, 128, 8, { 4, 1 }, kv, 1, 512));
        test_cases.emplace_back(new test_fasa_attend( 64,  64, 3, { 3, 1 }, kv, 1, 0));
        test_cases.emplace_back(new test_fasa_attend(128, 128, 8, { 4, 1 }, kv, 1, 0));
    }
    // a micro-batch of their prompts
    test_cases.emplace_back(new test_fasa_attend( 64,  64, 3, { 3, 1 }, 8192, 512, 0));
    test_cases.emplace_back(new test_fasa_attend(128, 128, 8, { 4, 1 }, 8192, 512, 0));
}
