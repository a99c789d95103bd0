// How this library was built, for whoever loaded it: torch.ops.eva_attn.build_info().
#include <torch/library.h>

#include "build_facts.h" // written by setup.py

namespace eva_attn {
namespace {

using Facts = c10::Dict<std::string, std::optional<std::string>>;

std::optional<std::string> text(const char* fact) {
    return fact ? std::optional<std::string>(fact) : std::nullopt;
}

Facts build_info() {
    Facts facts;
    facts.insert("torch", text(EVA_ATTN_TORCH));
#if defined(__clang__)
    facts.insert("compiler", text(__VERSION__));
#else
    facts.insert("compiler", text("GCC " __VERSION__));
#endif
    facts.insert("cuda_version", text(EVA_ATTN_CUDA_VERSION));
    facts.insert("cuda_arches", text(EVA_ATTN_CUDA_ARCHES));
    facts.insert("cpu_only_reason", text(EVA_ATTN_CPU_ONLY_REASON));
    return facts;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(eva_attn, m) { m.def("build_info() -> Dict(str, str?)", &build_info); }

} // namespace eva_attn
