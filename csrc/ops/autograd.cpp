// Autograd of the operators that have gradients, and autocast of all: in one file, as each takes in most of
// torch's headers.
#include "ops/autograd.h"

#include <torch/library.h>

#include "ops/autocast.h"
#include "ops/chunk_summary.h"
#include "ops/eva_attention.h"
#include "ops/window_attention.h"

namespace eva_attn {
namespace {

template <class Op>
void implement_autograd(torch::Library& m, const char* name, const char* backward_name) {
    m.impl(name, &AutogradForward<Op>::call);
    m.impl(backward_name, &AutogradBackward<Op>::call);
}

template <at::DeviceType device>
void implement_autocast(torch::Library& m) {
    m.impl("eva_attention", &Autocast<EvaAttention, device>::forward);
    m.impl("eva_attention_qkvpacked", &Autocast<EvaAttentionQkvpacked, device>::forward);
    m.impl("chunk_summary", &Autocast<ChunkSummary, device>::forward);
    m.impl("window_attention", &Autocast<WindowAttention, device>::forward);
    m.impl("decode_step", torch::CppFunction::makeFromBoxedFunction<&autocast_decode_step<device>>());
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, Autograd, m) {
    implement_autograd<EvaAttention>(m, "eva_attention", "eva_attention_backward");
    implement_autograd<EvaAttentionQkvpacked>(m, "eva_attention_qkvpacked",
                                              "eva_attention_qkvpacked_backward");
    implement_autograd<ChunkSummary>(m, "chunk_summary", "chunk_summary_backward");
    implement_autograd<WindowAttention>(m, "window_attention", "window_attention_backward");
}

TORCH_LIBRARY_IMPL(eva_attn, AutocastCPU, m) { implement_autocast<at::kCPU>(m); }

TORCH_LIBRARY_IMPL(eva_attn, AutocastCUDA, m) { implement_autocast<at::kCUDA>(m); }

} // namespace eva_attn
