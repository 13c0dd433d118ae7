// Instructions that each lane executes for itself, without memory: the table of what they compute.
#include "operations.h"

#include <cfenv>

#include "approximations.h"

namespace ptx {

uint64_t approximation_seed = 0;
void set_approximation(uint64_t seed) { approximation_seed = seed; }

namespace {

using namespace types;

// ---- what the C++ language does not have --------------------------------------------------------

template <class T>
using unsigned_t = std::make_unsigned_t<T>;

template <class T>
T wrapped(auto a) {  // arithmetic modulo 2^n
  return static_cast<T>(static_cast<unsigned_t<T>>(a));
}

template <class T>
T quotient(T a, T b) {
  if (b == 0) {
    return static_cast<T>(-1);
  }
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? wrapped<T>(-static_cast<unsigned_t<T>>(a))
                                                        : static_cast<T>(a / b);
}
template <class T>
T remainder_of(T a, T b) {
  if (b == 0) {
    return a;
  }
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? T(0) : static_cast<T>(a % b);
}

template <class T>
T shift_left(T a, u32 n) {
  return n >= 8 * sizeof(T) ? T(0) : static_cast<T>(a << n);
}
template <class T>
T shift_right(T a, u32 n) {
  return n >= 8 * sizeof(T) ? static_cast<T>(a < 0 ? -1 : 0) : static_cast<T>(a >> n);
}

template <class T>
T high_product(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>(static_cast<Wide>(a) * b >> 64);
  } else {
    using Wide = std::conditional_t<std::is_signed_v<T>, s64, u64>;
    return static_cast<T>(static_cast<Wide>(a) * b >> (8 * sizeof(T)));
  }
}

template <class T>
T insert_field(T field, T into, u32 at, u32 size) {
  constexpr u32 kBits = 8 * sizeof(T);
  at &= 0xff;
  size &= 0xff;
  if (at >= kBits) {
    return into;
  }
  const T ones = size >= kBits ? ~T(0) : (T(1) << size) - 1;
  return static_cast<T>((into & ~(ones << at)) | (field << at & ones << at));
}

template <class T>
T extract_field(T from, u32 at, u32 size) {
  constexpr u32 kBits = 8 * sizeof(T);
  at &= 0xff;
  size &= 0xff;
  const auto bit = [&](u32 i) { return static_cast<u64>(from) >> std::min(i, kBits - 1) & 1; };
  const bool sign = std::is_signed_v<T> && size > 0 && bit(at + size - 1) != 0;
  u64 out = sign ? ~u64{0} : 0;
  for (u32 i = 0; i < std::min(size, kBits); ++i) {
    const bool set = at + i < kBits ? bit(at + i) != 0 : sign;
    out = set ? out | u64{1} << i : out & ~(u64{1} << i);
  }
  return static_cast<T>(out);
}

u32 permuted(u32 a, u32 b, u32 selection) {
  const u64 bytes = u64{b} << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 select = selection >> 4 * i & 15;
    const u32 byte = bytes >> 8 * (select & 7) & 255;
    out |= (select & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return out;
}

u32 logic(u32 a, u32 b, u32 c, u32 table) {
  u32 out = 0;
  for (u32 row = 0; row < 8; ++row) {
    if (table >> row & 1) {
      out |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    }
  }
  return out;
}

template <class T>
T reversed(T x) {
  T out = 0;
  for (size_t i = 0; i < 8 * sizeof(T); ++i) {
    out |= (x >> i & 1) << (8 * sizeof(T) - 1 - i);
  }
  return out;
}

// Which bit is the first of value 1, or of an amount to shift it to the top.
template <class T>
u32 leading_zeros(T x) {
  return x == 0 ? 8 * sizeof(T)
                : static_cast<u32>(sizeof(T) == 8 ? __builtin_clzll(x)
                                                  : __builtin_clz(static_cast<u32>(x)));
}
template <class T>
u32 find_bit(T x, bool shift_amount) {
  const unsigned_t<T> bits = x < 0 ? ~static_cast<unsigned_t<T>>(x) : static_cast<unsigned_t<T>>(x);
  const u32 zeros = leading_zeros(bits);
  return bits == 0 ? ~0u : shift_amount ? zeros : static_cast<u32>(8 * sizeof(T) - 1) - zeros;
}

// `f` in another rounding mode than to the nearest.
template <int Mode, class F>
auto rounded(F f) {
  std::fesetround(Mode);
  volatile auto value = f();
  std::fesetround(FE_TONEAREST);
  return static_cast<decltype(f())>(value);
}

template <class T>
T opaque(T x) {  // whose arithmetic the compiler does not move out of a rounding mode
  volatile T copy = x;
  return copy;
}

u16 to_bfloat16(f32 x) {
  if (std::isnan(x)) {
    return 0x7fff;
  }
  const auto bits = static_cast<u32>(bits_of(x));
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
u16 to_half(f32 x) {
  return std::isnan(x) ? u16{0x7fff} : static_cast<u16>(bits_of(static_cast<_Float16>(x)));
}
f32 from_bfloat16(u16 x) { return value_of<f32>(u64{x} << 16); }
f32 from_half(u16 x) { return static_cast<f32>(value_of<_Float16>(x)); }

// Out of range is the nearest that is in it; what a NaN becomes depends on the types.
template <class D, class S>
D to_integer(S x) {
  if (std::isnan(x)) {
    return sizeof(D) == 8 || sizeof(S) == 8 ? static_cast<D>(D(1) << (8 * sizeof(D) - 1)) : D(0);
  }
  const S least = static_cast<S>(std::numeric_limits<D>::min());
  const S most = std::ldexp(S(1), std::numeric_limits<D>::digits);
  return x <= least  ? std::numeric_limits<D>::min()
         : x >= most ? std::numeric_limits<D>::max()
                     : static_cast<D>(x);
}

// ---- the table ----------------------------------------------------------------------------------

template <class T, bool Ftz>
struct Flushed {
  static T of(T x) {
    if constexpr (Ftz) {
      return detail::flush(x);
    } else {
      return x;
    }
  }
};

// Arithmetic of floating point, with or without .ftz.
template <class T, bool Ftz = false>
void add_float(Table& t, const std::string& type) {
  using F = Flushed<T, Ftz>;
  for (const std::string rounding : {"", ".rn"}) {
    t["add" + rounding + type] =
        per_lane<[](T a, T b) -> T { return F::of(F::of(a) + F::of(b)); }>();
    t["sub" + rounding + type] =
        per_lane<[](T a, T b) -> T { return F::of(F::of(a) - F::of(b)); }>();
    t["mul" + rounding + type] =
        per_lane<[](T a, T b) -> T { return F::of(F::of(a) * F::of(b)); }>();
  }
  t["fma.rn" + type] =
      per_lane<[](T a, T b, T c) -> T { return F::of(std::fma(F::of(a), F::of(b), F::of(c))); }>();
  t["div.rn" + type] = per_lane<[](T a, T b) -> T { return F::of(F::of(a) / F::of(b)); }>();
  t["rcp.rn" + type] = per_lane<[](T a) -> T { return F::of(T(1) / F::of(a)); }>();
  t["sqrt.rn" + type] = per_lane<[](T a) -> T { return F::of(std::sqrt(F::of(a))); }>();
  t["neg" + type] = per_lane<[](T a) -> T { return F::of(-a); }>();
  t["abs" + type] = per_lane<[](T a) -> T { return F::of(std::fabs(a)); }>();
  t["min" + type] = per_lane<[](T a, T b) -> T { return least(F::of(a), F::of(b)); }>();
  t["max" + type] = per_lane<[](T a, T b) -> T { return greatest(F::of(a), F::of(b)); }>();
  t["setp.eq" + type] = per_lane<[](T a, T b) -> u8 { return F::of(a) == F::of(b); }>();
  t["setp.ne" + type] =
      per_lane<[](T a, T b) -> u8 { return (F::of(a) < F::of(b) || F::of(a) > F::of(b)); }>();
  t["setp.lt" + type] = per_lane<[](T a, T b) -> u8 { return F::of(a) < F::of(b); }>();
  t["setp.le" + type] = per_lane<[](T a, T b) -> u8 { return F::of(a) <= F::of(b); }>();
  t["setp.gt" + type] = per_lane<[](T a, T b) -> u8 { return (F::of(a) > F::of(b)); }>();
  t["setp.ge" + type] = per_lane<[](T a, T b) -> u8 { return F::of(a) >= F::of(b); }>();
  t["setp.equ" + type] =
      per_lane<[](T a, T b) -> u8 { return !(F::of(a) < F::of(b) || F::of(a) > F::of(b)); }>();
  t["setp.neu" + type] = per_lane<[](T a, T b) -> u8 { return !(F::of(a) == F::of(b)); }>();
  t["setp.ltu" + type] = per_lane<[](T a, T b) -> u8 { return !(F::of(a) >= F::of(b)); }>();
  t["setp.leu" + type] = per_lane<[](T a, T b) -> u8 { return !(F::of(a) > F::of(b)); }>();
  t["setp.gtu" + type] = per_lane<[](T a, T b) -> u8 { return !(F::of(a) <= F::of(b)); }>();
  t["setp.geu" + type] = per_lane<[](T a, T b) -> u8 { return !(F::of(a) < F::of(b)); }>();
  t["setp.num" + type] =
      per_lane<[](T a, T b) -> u8 { return !std::isnan(a) && !std::isnan(b); }>();
  t["setp.nan" + type] = per_lane<[](T a, T b) -> u8 { return std::isnan(a) || std::isnan(b); }>();
}

// Rounded otherwise than to the nearest.
template <class T, int Mode>
void add_rounded(Table& t, const std::string& rounding_and_type) {
  t["add" + rounding_and_type] = per_lane<[](T a, T b) -> T {
    return rounded<Mode>([&] { return opaque(a) + opaque(b); });
  }>();
  t["mul" + rounding_and_type] = per_lane<[](T a, T b) -> T {
    return rounded<Mode>([&] { return opaque(a) * opaque(b); });
  }>();
  t["fma" + rounding_and_type] = per_lane<[](T a, T b, T c) -> T {
    return rounded<Mode>([&] { return std::fma(opaque(a), opaque(b), opaque(c)); });
  }>();
  t["div" + rounding_and_type] = per_lane<[](T a, T b) -> T {
    return rounded<Mode>([&] { return opaque(a) / opaque(b); });
  }>();
}

template <bool Ftz>
void add_approximations(Table& t, const std::string& type) {
  t["ex2.approx" + type] = per_lane<[](f32 a) { return ex2_approx<Ftz>(a); }>();
  t["lg2.approx" + type] = per_lane<[](f32 a) { return lg2_approx<Ftz>(a); }>();
  t["rcp.approx" + type] = per_lane<[](f32 a) { return rcp_approx<Ftz>(a); }>();
  t["sqrt.approx" + type] = per_lane<[](f32 a) { return sqrt_approx<Ftz>(a); }>();
  t["rsqrt.approx" + type] = per_lane<[](f32 a) { return rsqrt_approx<Ftz>(a); }>();
  t["div.approx" + type] = per_lane<[](f32 a, f32 b) { return div_approx<Ftz>(a, b); }>();
  t["div.full" + type] = per_lane<[](f32 a, f32 b) { return div_full<Ftz>(a, b); }>();
}

template <class T>
void add_integer(Table& t, const std::string& type) {
  using U = unsigned_t<T>;
  t["add" + type] = per_lane<[](T a, T b) -> T { return wrapped<T>(U(a) + U(b)); }>();
  t["sub" + type] = per_lane<[](T a, T b) -> T { return wrapped<T>(U(a) - U(b)); }>();
  t["mul.lo" + type] = per_lane<[](T a, T b) -> T { return wrapped<T>(u64(U(a)) * U(b)); }>();
  t["mad.lo" + type] =
      per_lane<[](T a, T b, T c) -> T { return wrapped<T>(u64(U(a)) * U(b) + U(c)); }>();
  t["mul.hi" + type] = per_lane<[](T a, T b) -> T { return high_product(a, b); }>();
  t["div" + type] = per_lane<[](T a, T b) -> T { return quotient(a, b); }>();
  t["rem" + type] = per_lane<[](T a, T b) -> T { return remainder_of(a, b); }>();
  t["neg" + type] = per_lane<[](T a) -> T { return wrapped<T>(-U(a)); }>();
  t["abs" + type] = per_lane<[](T a) -> T { return a < 0 ? wrapped<T>(-U(a)) : a; }>();
  t["min" + type] = per_lane<[](T a, T b) -> T { return least(a, b); }>();
  t["max" + type] = per_lane<[](T a, T b) -> T { return greatest(a, b); }>();
  t["shr" + type] = per_lane<[](T a, u32 n) -> T { return shift_right(a, n); }>();
  t["setp.lt" + type] = per_lane<[](T a, T b) -> u8 { return a < b; }>();
  t["setp.le" + type] = per_lane<[](T a, T b) -> u8 { return a <= b; }>();
  t["setp.gt" + type] = per_lane<[](T a, T b) -> u8 { return (a > b); }>();
  t["setp.ge" + type] = per_lane<[](T a, T b) -> u8 { return a >= b; }>();
  if constexpr (std::is_unsigned_v<T>) {
    for (const auto& [name, integers] :
         {std::pair{".lo", ".lt"}, {".ls", ".le"}, {".hi", ".gt"}, {".hs", ".ge"}}) {
      t[std::string("setp") + name + type] = t[std::string("setp") + integers + type];
    }
  }
  if constexpr (sizeof(T) >= 4) {
    t["bfind" + type] = per_lane<[](T a) { return find_bit(a, false); }>();
    t["bfind.shiftamt" + type] = per_lane<[](T a) { return find_bit(a, true); }>();
    t["bfe" + type] = per_lane<[](T a, u32 at, u32 n) -> T { return extract_field(a, at, n); }>();
  }
}

template <class T, class Wide>
void add_wide(Table& t, const std::string& type) {
  t["mul.wide" + type] = per_lane<[](T a, T b) -> Wide { return Wide{a} * b; }>();
  t["mad.wide" + type] = per_lane<[](T a, T b, Wide c) -> Wide {
    return wrapped<Wide>(static_cast<u64>(Wide{a} * b) + static_cast<u64>(c));
  }>();
}

template <class T>
void add_bits(Table& t, const std::string& type) {
  t["and" + type] = per_lane<[](T a, T b) -> T { return a & b; }>();
  t["or" + type] = per_lane<[](T a, T b) -> T { return a | b; }>();
  t["xor" + type] = per_lane<[](T a, T b) -> T { return a ^ b; }>();
  t["not" + type] = per_lane<[](T a) -> T { return static_cast<T>(~a); }>();
  t["shl" + type] = per_lane<[](T a, u32 n) -> T { return shift_left(a, n); }>();
  t["shr" + type] = per_lane<[](T a, u32 n) -> T { return shift_right(a, n); }>();
  if constexpr (sizeof(T) >= 4) {
    t["popc" + type] = per_lane<[](T a) { return static_cast<u32>(__builtin_popcountll(a)); }>();
    t["clz" + type] = per_lane<[](T a) { return leading_zeros(a); }>();
    t["brev" + type] = per_lane<[](T a) { return reversed(a); }>();
    t["bfi" + type] =
        per_lane<[](T a, T b, u32 at, u32 n) -> T { return insert_field(a, b, at, n); }>();
  }
}

// What every type has.
template <class T>
void add_any(Table& t, const std::string& type) {
  t["mov" + type] = per_lane<[](T a) { return a; }>();
  t["selp" + type] = per_lane<[](T a, T b, u8 c) { return c & 1 ? a : b; }>();
  t["slct" + type + ".s32"] = per_lane<[](T a, T b, s32 c) { return c >= 0 ? a : b; }>();
  if constexpr (std::is_integral_v<T>) {
    t["setp.eq" + type] = per_lane<[](T a, T b) -> u8 { return a == b; }>();
    t["setp.ne" + type] = per_lane<[](T a, T b) -> u8 { return a != b; }>();
  }
}

template <class S>
void add_conversions_from(Table& t, const std::string& from) {
  for_integers([&]<class D>(D, const std::string& to) {
    if constexpr (std::is_integral_v<S>) {
      t["cvt" + to + from] = per_lane<[](S a) { return static_cast<D>(a); }>();
      t["cvt.sat" + to + from] = per_lane<[](S a) {
        constexpr __int128 low = std::numeric_limits<D>::min(),
                           high = std::numeric_limits<D>::max();
        return static_cast<D>(std::min(std::max(static_cast<__int128>(a), low), high));
      }>();
    } else {
      t["cvt.rzi" + to + from] = per_lane<[](S a) { return to_integer<D>(std::trunc(a)); }>();
      t["cvt.rni" + to + from] = per_lane<[](S a) { return to_integer<D>(std::nearbyint(a)); }>();
      t["cvt.rmi" + to + from] = per_lane<[](S a) { return to_integer<D>(std::floor(a)); }>();
      t["cvt.rpi" + to + from] = per_lane<[](S a) { return to_integer<D>(std::ceil(a)); }>();
    }
  });
  if constexpr (std::is_integral_v<S>) {
    t["cvt.rn.f32" + from] = per_lane<[](S a) { return static_cast<f32>(a); }>();
    t["cvt.rn.f64" + from] = per_lane<[](S a) { return static_cast<f64>(a); }>();
  } else {
    t["cvt.rzi" + from + from] = per_lane<[](S a) { return std::trunc(a); }>();
    t["cvt.rni" + from + from] = per_lane<[](S a) { return std::nearbyint(a); }>();
    t["cvt.rmi" + from + from] = per_lane<[](S a) { return std::floor(a); }>();
    t["cvt.rpi" + from + from] = per_lane<[](S a) { return std::ceil(a); }>();
    t["cvt.sat" + from + from] =
        per_lane<[](S a) -> S { return (std::isnan(a) || a <= 0 ? S(0)
                                        : a > 1                 ? S(1)
                                                                : a); }>();
  }
}

void add_float_conversions(Table& t) {
  t["cvt.f64.f32"] = per_lane<[](f32 a) -> f64 { return a; }>();
  t["cvt.rn.f32.f64"] = per_lane<[](f64 a) { return static_cast<f32>(a); }>();
  t["cvt.rz.f32.f64"] = per_lane<[](f64 a) {
    return rounded<FE_TOWARDZERO>([&] { return static_cast<f32>(opaque(a)); });
  }>();
  t["cvt.f32.f16"] = per_lane<[](u16 a) { return from_half(a); }>();
  t["cvt.f32.bf16"] = per_lane<[](u16 a) { return from_bfloat16(a); }>();
  t["cvt.rn.f16.f32"] = per_lane<[](f32 a) { return to_half(a); }>();
  t["cvt.rn.bf16.f32"] = per_lane<[](f32 a) { return to_bfloat16(a); }>();
  t["cvt.rn.f16x2.f32"] =
      per_lane<[](f32 a, f32 b) -> u32 { return u32{to_half(a)} << 16 | to_half(b); }>();
  t["cvt.rn.bf16x2.f32"] =
      per_lane<[](f32 a, f32 b) -> u32 { return u32{to_bfloat16(a)} << 16 | to_bfloat16(b); }>();
}

void add_others(Table& t) {
  t["and.pred"] = per_lane<[](u8 a, u8 b) -> u8 { return a & b & 1; }>();
  t["or.pred"] = per_lane<[](u8 a, u8 b) -> u8 { return (a | b) & 1; }>();
  t["xor.pred"] = per_lane<[](u8 a, u8 b) -> u8 { return (a ^ b) & 1; }>();
  t["not.pred"] = per_lane<[](u8 a) -> u8 { return !(a & 1); }>();
  t["mov.pred"] = per_lane<[](u8 a) -> u8 { return a & 1; }>();
  t["copysign.f32"] = per_lane<[](f32 a, f32 b) { return std::copysign(b, a); }>();
  t["copysign.f64"] = per_lane<[](f64 a, f64 b) { return std::copysign(b, a); }>();
  t["rcp.approx.ftz.f64"] = per_lane<[](f64 a) { return rcp_approx(a); }>();
  t["prmt.b32"] = per_lane<[](u32 a, u32 b, u32 c) { return permuted(a, b, c); }>();
  t["lop3.b32"] = per_lane<[](u32 a, u32 b, u32 c, u32 table) { return logic(a, b, c, table); }>();
  t["shf.l.wrap.b32"] = per_lane<[](u32 a, u32 b, u32 n) {
    return static_cast<u32>((u64{b} << 32 | a) << (n & 31) >> 32);
  }>();
  t["shf.r.wrap.b32"] = per_lane<[](u32 a, u32 b, u32 n) {
    return static_cast<u32>((u64{b} << 32 | a) >> (n & 31));
  }>();
  t["shf.l.clamp.b32"] = per_lane<[](u32 a, u32 b, u32 n) {
    return static_cast<u32>(n >= 32 ? a : (u64{b} << 32 | a) << n >> 32);
  }>();
  t["shf.r.clamp.b32"] = per_lane<[](u32 a, u32 b, u32 n) {
    return static_cast<u32>(n >= 32 ? b : (u64{b} << 32 | a) >> n);
  }>();
}

}  // namespace

void add_arithmetic(Table& t) {
  add_float<f32>(t, ".f32");
  add_float<f32, true>(t, ".ftz.f32");
  add_float<f64>(t, ".f64");
  add_rounded<f32, FE_TOWARDZERO>(t, ".rz.f32");
  add_rounded<f32, FE_DOWNWARD>(t, ".rm.f32");
  add_rounded<f32, FE_UPWARD>(t, ".rp.f32");
  add_approximations<false>(t, ".f32");
  add_approximations<true>(t, ".ftz.f32");
  for_integers([&]<class T>(T, const std::string& type) {
    if constexpr (sizeof(T) > 1) {
      add_integer<T>(t, type);
      add_any<T>(t, type);
    }
    add_conversions_from<T>(t, type);
  });
  add_conversions_from<f32>(t, ".f32");
  add_conversions_from<f64>(t, ".f64");
  add_any<f32>(t, ".f32");
  add_any<f64>(t, ".f64");
  add_any<u16>(t, ".b16");
  add_any<u32>(t, ".b32");
  add_any<u64>(t, ".b64");
  add_bits<u16>(t, ".b16");
  add_bits<u32>(t, ".b32");
  add_bits<u64>(t, ".b64");
  add_wide<s16, s32>(t, ".s16");
  add_wide<u16, u32>(t, ".u16");
  add_wide<s32, s64>(t, ".s32");
  add_wide<u32, u64>(t, ".u32");
  add_float_conversions(t);
  add_others(t);
}

}  // namespace ptx
