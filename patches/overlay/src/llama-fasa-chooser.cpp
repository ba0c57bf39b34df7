#include "llama-fasa-chooser.h"

#include <atomic>

static std::atomic<const llama_fasa_choosers *> fasa_choosers = nullptr;

bool llama_fasa_set_choosers(const llama_fasa_choosers & choosers) {
    static const llama_fasa_choosers own = {};

    if (choosers.sizeof_args != own.sizeof_args || choosers.sizeof_params != own.sizeof_params || choosers.version != own.version) {
        return false;
    }
    fasa_choosers = &choosers;
    return true;
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
