// What FASA is compared with: others who choose the cells, in plain code on the CPU. For evaluation, in a library of its own
// (libllama-fasa-eval), which a build has with the CMake option FASA_EVAL.

#pragma once

#include "llama-fasa.h"

#if defined(_WIN32) && !defined(__MINGW32__)
#    ifdef LLAMA_FASA_EVAL_BUILD
#        define LLAMA_FASA_EVAL_API __declspec(dllexport)
#    else
#        define LLAMA_FASA_EVAL_API __declspec(dllimport)
#    endif
#else
#    define LLAMA_FASA_EVAL_API __attribute__ ((visibility ("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

    // which cells a head attends to: llama_fasa_params.policy, and by name the override fasa.policy
    //
    // A layer runs dense (LLAMA_FASA_REASON_POLICY) where its policy cannot choose: all but FASA take K in host memory; SNAPKV
    // and H2O a prompt that they observed, of the only sequence in a stream; FASA_SUM, RANDOM and QUEST K that is not rotated.
    LLAMA_FASA_ENUM(llama_fasa_policy_type) {
        LLAMA_FASA_POLICY_TYPE_FASA,
        LLAMA_FASA_POLICY_TYPE_FASA_SUM,  // a group's score is the sum of its heads' softmax, not the greatest
        LLAMA_FASA_POLICY_TYPE_ORACLE,    // all chunks
        LLAMA_FASA_POLICY_TYPE_RANDOM,    // n_tip chunks drawn at random
        LLAMA_FASA_POLICY_TYPE_STREAMING, // the first n_sink cells and the last ones
        LLAMA_FASA_POLICY_TYPE_QUEST,     // pages of 16 cells, by bounds of their keys
        LLAMA_FASA_POLICY_TYPE_UNIQUE,    // the same pages, by mean and deviation of their keys
        LLAMA_FASA_POLICY_TYPE_SNAPKV,    // cells of the prompt, by the attention of its last tokens; and all that is decoded
        LLAMA_FASA_POLICY_TYPE_H2O,       // cells by the attention that they have had
        LLAMA_FASA_POLICY_TYPE_COUNT,
    };

    // NULL: no such policy
    LLAMA_FASA_EVAL_API const char * llama_fasa_policy_name(enum llama_fasa_policy_type policy);

    // Before it, libllama knows FASA alone: it refuses other settings, and the override has no effect. Once is enough.
    // false: this library is of another build than libllama, and is left out
    LLAMA_FASA_EVAL_API bool llama_fasa_eval_init(void);

#ifdef __cplusplus
}
#endif
