#pragma once

#include <ATen/autocast_mode.h>

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

} // namespace eva_attn
