#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/stack.h>

#include "ops/signature.h"

namespace eva_attn {

// Casts the inputs to the autocast dtype; options, float32 or not, stay as they are.
template <class Op, at::DeviceType device, class Inputs = typename Op::Inputs,
          class Options = typename Op::Options>
struct Autocast;

template <class Op, at::DeviceType device, class... Inputs, class... Options>
struct Autocast<Op, device, Types<Inputs...>, Types<Options...>> {
    static Tensors<Op::kNumOutputs> forward(Inputs... inputs, Options... options) {
        const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
        const auto dtype = at::autocast::get_autocast_dtype(device);
        return forward_op<Op>().call(at::autocast::cached_cast(dtype, inputs, device)..., options...);
    }
};

// The state stays as it is: the tokens are cast to its dtype, and the output to autocast's.
template <at::DeviceType device>
void autocast_decode_step(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    constexpr size_t kTokens = 3; // query, key, value; then comes the state
    const size_t size = op.schema().arguments().size();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto dtype = torch::jit::peek(*stack, kTokens, size).toTensor().scalar_type();
    for (size_t i = 0; i < kTokens; ++i) {
        c10::IValue& tokens = torch::jit::peek(*stack, i, size);
        tokens = tokens.toTensor().to(dtype);
    }
    op.callBoxed(stack);
    c10::IValue& output = torch::jit::peek(*stack, 0, 1);
    output = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), output.toTensor(), device);
}

} // namespace eva_attn
