#include "llama-fasa-chooser.h"

#include <atomic>

static std::atomic<const llama_fasa_choosers *> fasa_choosers = nullptr;

void llama_fasa_set_choosers(const llama_fasa_choosers * choosers) {
    fasa_choosers = choosers;
}

const char * llama_fasa_chooser_name(int32_t policy) {
    if (policy == 0) {
        return "fasa";
    }
    const auto * choosers = fasa_choosers.load();

    return choosers && policy > 0 ? choosers->name(policy) : nullptr;
}

std::unique_ptr<llama_fasa_chooser> llama_fasa_make_chooser() {
    return fasa_choosers.load()->make();
}
