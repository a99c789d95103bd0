// Signatures of an op and its backward, derived from the one function that spells its options.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <array>
#include <c10/core/SymIntArrayRef.h>

#include "ops/call.h"

namespace eva_attn {

template <class... T>
struct Types {};

namespace detail {
template <class Function>
struct Parameters;
template <class Result, class... T>
struct Parameters<Result (*)(T...)> {
    using type = Types<T...>;
};
template <class Results, class... Lists>
struct Signature;
template <class Results, class... A>
struct Signature<Results, Types<A...>> {
    using type = Results(A...);
};
template <class Results, class... A, class... B, class... Rest>
struct Signature<Results, Types<A...>, Types<B...>, Rest...>
    : Signature<Results, Types<A..., B...>, Rest...> {};
template <size_t... I>
auto references(std::index_sequence<I...>) -> Types<decltype((void)I, std::declval<const Tensor&>())...>;
} // namespace detail

template <auto function>
using Parameters = typename detail::Parameters<decltype(function)>::type;

template <size_t n>
using TensorReferences = decltype(detail::references(std::make_index_sequence<n>()));

// An `Op` has names, `Inputs`, `Options` and `GradOutputs` as Types, and the counts kNumOutputs,
// kNumGradients.
template <class Op>
using ForwardSignature =
    typename detail::Signature<Tensors<Op::kNumOutputs>, typename Op::Inputs, typename Op::Options>::type;
template <class Op>
using BackwardSignature =
    typename detail::Signature<Tensors<Op::kNumGradients>, typename Op::GradOutputs, typename Op::Inputs,
                               TensorReferences<Op::kNumOutputs>, typename Op::Options>::type;

template <class Op>
const auto& forward_op() {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(Op::kName, "").template typed<ForwardSignature<Op>>();
    return op;
}
template <class Op>
const auto& backward_op() {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow(Op::kBackwardName, "")
                               .template typed<BackwardSignature<Op>>();
    return op;
}

} // namespace eva_attn
