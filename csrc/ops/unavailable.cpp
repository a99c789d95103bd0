// A build without CUDA kernels says so.
#include <torch/library.h>

#if !EVA_ATTN_WITH_CUDA
namespace eva_attn {
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

} // namespace eva_attn
#endif
