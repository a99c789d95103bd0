// How this library was built, for whoever loaded it: torch.ops.eva_attn.build_info(); one without CUDA
// kernels also says so where they are asked for.
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

#if !EVA_ATTN_WITH_CUDA
namespace {

void unavailable(const c10::OperatorHandle& op, torch::jit::Stack*) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, op.operator_name(),
        ": this build of eva_attn has no CUDA kernels (eva_attn.build_info()[\"cpu_only_reason\"] says why); "
        "move the tensors to the CPU, or use the same function of eva_attn.reference, which is plain PyTorch "
        "and runs on any device");
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, CUDA, m) {
    for (const char* name : {"eva_attention", "eva_attention_backward", "eva_attention_qkvpacked",
                             "eva_attention_qkvpacked_backward", "chunk_summary", "chunk_summary_backward",
                             "window_attention", "window_attention_backward", "decode_step"}) {
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&unavailable>());
    }
}
#endif

} // namespace eva_attn
