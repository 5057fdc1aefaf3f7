// One memory layer on a card: proposals, gates, the rule, and the corrections laid onto what the decoder computed. Compiled at run time for the
// card that is there, with the layer's sizes as definitions:
//   RANK, HEADS       of the states; W and R below follow from them
//   MODE              0 standard, 1 lambda_outside, 2 no_lambda
//   GATES             gates in one head: RANK or 1
//   OWN_LAMBDA        1: lambda has a network of its own
//   NORMALIZE         1: q and k are l2(tanh(W h))
//   ELEMENT           the decoder's numbers: 0 float, 1 half, 2 bfloat16
//   CALL_BYTES        what the host thinks that a Call has
// Everything is computed in float32. Each number is summed in an order that hangs on the layer's widths alone, never on batch, tokens or how
// many threads there are, so that any split of a stream into calls gives the same bits. Products and sums are rounded together where
// fmaf says so and nowhere else: compile without contraction.
//
// The language is C, so that a test can run the same text without a card.

#ifdef __CUDACC_RTC__
#define KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Call call)
#define INSIDE static __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define UNROLL_BY(n) _Pragma("unroll 8")
#define ALIGNED(bytes) __align__(bytes)
#endif

typedef long long i64;

#define R (HEADS * RANK)
#define G (HEADS * GATES)
// The columns of the networks: q, k, v, the logits of beta and, where lambda is its own, those of 1 - lambda.
#define W (3 * R + (1 + OWN_LAMBDA) * G)

// The networks' sums: LEAF rows one behind the other, LEAVES of them to a part, and the parts in their order.
#define LEAF 8
#define LEAVES 8
#define PART (LEAF * LEAVES)
#define COLUMNS 32
// Rows (a sequence's token each) that one block takes in a step of one token, and in a prompt.
#define FEW 4
#define MANY 8

// Threads that lay corrections, and rows that they take at a time.
#define WIDE 128
#define ROWS 8

// A step in one launch: threads of a block, and the most numbers of the networks that each block reads by itself. Above W of 512 there is none.
#define STEP 512
#define SMALL (96 << 10)

// Weights of a correction that are brought before the sums are there: all rows of them, where they are few. So is a row of S up to rank 16.
#define BROUGHT (R <= 16 ? R : 1)

// The scan: tokens that are prepared at a time, and the threads that prepare them.
#define TILE (RANK <= 16 ? 32 : RANK <= 32 ? 16 : 8)
#define PREPARING 96
#define SCANNING ((RANK + 31) / 32 * 32)
#define PADDED ((RANK + 3) / 4 * 4)

#define TARGETS 4
#define CORRECTIONS 4

#if ELEMENT == 0
typedef float Number;
#else
typedef unsigned short Number;
#endif

typedef struct {
    i64 from;  // its first column of the corrections
    i64 width;
    i64 start;  // where in the target's rows it is laid
} Correction;

typedef struct {
    const Number *source;  // rows that it is made from; none: it begins with nothing
    Number *out;           // [rows, width]
    const float *norm;     // weights of an RMS norm of the (one) correction; none: it has none
    i64 stride;            // of the source's rows
    i64 begin;             // the first column of the source
    i64 width;
    i64 slices;  // blocks that share a row
    i64 count;   // corrections
    Correction corrections[CORRECTIONS];
    float epsilon;
    float unused;
} Target;

typedef struct {
    const Number *hidden;      // [batch, tokens, width]
    const float *mask;         // [batch, tokens]
    const float *past;         // a sequence's states at past_stride, [HEADS, RANK, RANK]
    const float *networks;     // [width, W]
    const float *bias;         // [W - 3 R]
    const float *corrections;  // [R, columns]
    float *state;              // [batch, HEADS, RANK, RANK]
    float *work;
    i64 past_stride;
    i64 batch;
    i64 tokens;
    i64 width;
    i64 columns;
    i64 parts;
    i64 slices;  // blocks that share a row, of all targets
    i64 targets;
    Target target[TARGETS];
} Call;

typedef char call_is_as_the_host_thinks[sizeof(Call) == CALL_BYTES ? 1 : -1];

// ---- The decoder's numbers

#if ELEMENT == 0

INSIDE float widen(Number x) { return x; }
INSIDE Number narrow(float x) { return x; }

#elif ELEMENT == 1 && defined(__CUDACC_RTC__)

INSIDE float widen(Number x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

INSIDE Number narrow(float x) {
    Number y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

#else

INSIDE float of_bits(unsigned x) {
#ifdef __CUDACC_RTC__
    return __uint_as_float(x);
#else
    union {
        unsigned bits;
        float number;
    } both;
    both.bits = x;
    return both.number;
#endif
}

INSIDE unsigned bits_of(float x) {
#ifdef __CUDACC_RTC__
    return __float_as_uint(x);
#else
    union {
        float number;
        unsigned bits;
    } both;
    both.number = x;
    return both.bits;
#endif
}

#if ELEMENT == 2

INSIDE float widen(Number x) { return of_bits((unsigned)x << 16); }

INSIDE Number narrow(float x) {
    unsigned bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (Number)(bits >> 16 | 0x40u);  // not a number, and stays so
    return (Number)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#else

INSIDE float widen(Number x) {
    unsigned sign = (unsigned)(x & 0x8000u) << 16, rest = x & 0x7fffu;
    if (rest >= 0x7c00u) return of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // The exponent is too small by 112; the product mends it, for what is below the normal numbers too.
    return of_bits(sign | rest << 13) * of_bits((127u + 112u) << 23);
}

INSIDE Number narrow(float x) {
    unsigned bits = bits_of(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (Number)(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return (Number)(sign | 0x7c00u);  // 65520 and more
    if (rest < 0x38800000u) {
        // Below 2^-14 halves stand 2^-24 apart, which are the last digits of a number between 0.5 and 1.
        return (Number)(sign | (bits_of(of_bits(rest) + 0.5f) - 0x3f000000u));
    }
    rest -= 112u << 23;
    return (Number)(sign | (rest + 0xfffu + (rest >> 13 & 1u)) >> 13);
}

#endif
#endif

// ---- What stands between the networks and the rule

// Whether a column's sum is taken through tanh at once.
INSIDE float proposed(float sum, i64 column) { return NORMALIZE && column < 2 * R ? tanhf(sum) : sum; }

// What a vector of q or k is divided by: max(|x|, 1e-6).
INSIDE float length_of(const float *x) {
    float sum = 0.0f;
    UNROLL for (int j = 0; j < RANK; j++) sum = fmaf(x[j], x[j], sum);
    return fmaxf(sqrtf(sum), 1e-6f);
}

typedef struct {
    float keep, erase, write;
} Gate;

// The gates of one row or head, from their logits. 1 - sigmoid(x) as sigmoid(-x), so that it keeps its digits.
INSIDE Gate gate_of(const float *proposal, const float *bias, int g) {
    float x = proposal[3 * R + g] + bias[g];
    float small = expf(-fabsf(x));
    float high = 1.0f / (1.0f + small), low = small / (1.0f + small);
    float beta = x >= 0.0f ? high : low, lambda = x >= 0.0f ? low : high;
    Gate gate;
#if OWN_LAMBDA
    x = -(proposal[3 * R + G + g] + bias[G + g]);
    small = expf(-fabsf(x));
    lambda = x >= 0.0f ? 1.0f / (1.0f + small) : small / (1.0f + small);
#endif
    gate.keep = MODE == 2 ? 1.0f : lambda;
    gate.erase = MODE == 1 ? lambda * beta : beta;
    gate.write = beta;
    return gate;
}

// A row of S by a vector: four sums side by side, so that none waits for another.
INSIDE float recalled(const float *row, const float *x) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    UNROLL for (int j = 0; j < RANK; j++) sums[j % 4] = fmaf(row[j], x[j], sums[j % 4]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// What a token puts into a row for each number of its key. `recall` is S k of the undecayed row.
INSIDE float amount_of(float erase, float recall, float written) { return fmaf(-erase, recall, written); }

INSIDE float moved(float amount, float key, float keep, float x) { return fmaf(amount, key, keep * x); }

// ---- The networks

// One part's rows of `hidden`, of `count` rows from `first` on; zeros where there is nothing.
INSIDE float hidden_at(const Call *call, i64 first, i64 part, int n) {
    i64 row = first + n / PART, d = part * PART + n % PART;
    return row < call->batch * call->tokens && d < call->width ? widen(call->hidden[row * call->width + d]) : 0.0f;
}

INSIDE void weights_of(const Call *call, i64 part, int leaf, i64 column, float *weights) {
    UNROLL for (int j = 0; j < LEAF; j++) {
        i64 d = part * PART + leaf * LEAF + j;
        weights[j] = column < W && d < call->width ? call->networks[d * W + column] : 0.0f;
    }
}

INSIDE float leaf_of(const float *x, const float *weights) {
    float sum = 0.0f;
    UNROLL for (int j = 0; j < LEAF; j++) sum = fmaf(x[j], weights[j], sum);
    return sum;
}

#define COLUMN_TILES ((W + COLUMNS - 1) / COLUMNS)

// A step of one token: the sums of each part, [batch, parts, W], one block for FEW rows, COLUMNS columns and a part.
KERNEL(propose, LEAVES * COLUMNS) {
    __shared__ ALIGNED(16) float x[FEW * PART];
    __shared__ float sums[LEAVES][FEW][COLUMNS];
    int lane = threadIdx.x % COLUMNS, leaf = threadIdx.x / COLUMNS;
    i64 part = blockIdx.x % call.parts, rest = blockIdx.x / call.parts;
    i64 column = rest % COLUMN_TILES * COLUMNS + lane, first = rest / COLUMN_TILES * FEW;
    float weights[LEAF];
    weights_of(&call, part, leaf, column, weights);
    x[threadIdx.x] = hidden_at(&call, first, part, threadIdx.x);
    __syncthreads();
    UNROLL for (int row = 0; row < FEW; row++) sums[leaf][row][lane] = leaf_of(x + row * PART + leaf * LEAF, weights);
    __syncthreads();
    i64 row = first + leaf;
    if (leaf < FEW && row < call.batch && column < W) {
        float sum = 0.0f;
        UNROLL for (int n = 0; n < LEAVES; n++) sum += sums[n][leaf][lane];
        call.work[(row * call.parts + part) * W + column] = sum;
    }
}

// A prompt: what the networks propose, [rows, W], with q and k taken through tanh; one block for MANY rows and COLUMNS columns. While one part
// is summed the next one comes.
KERNEL(propose_many, LEAVES * COLUMNS) {
    __shared__ ALIGNED(16) float x[2][MANY * PART];
    __shared__ float sums[LEAVES][MANY][COLUMNS];
    int lane = threadIdx.x % COLUMNS, leaf = threadIdx.x / COLUMNS, next = threadIdx.x + LEAVES * COLUMNS;
    i64 column = blockIdx.x % COLUMN_TILES * COLUMNS + lane, first = (i64)blockIdx.x / COLUMN_TILES * MANY;
    float weights[LEAF], total = 0.0f;
    weights_of(&call, 0, leaf, column, weights);
    x[0][threadIdx.x] = hidden_at(&call, first, 0, threadIdx.x);
    x[0][next] = hidden_at(&call, first, 0, next);
    for (i64 part = 0; part < call.parts; part++) {
        const float *own = x[part % 2];
        float coming[LEAF], one = 0.0f, two = 0.0f;
        int more = part + 1 < call.parts;
        __syncthreads();
        if (more) {
            weights_of(&call, part + 1, leaf, column, coming);
            one = hidden_at(&call, first, part + 1, threadIdx.x);
            two = hidden_at(&call, first, part + 1, next);
        }
        UNROLL for (int row = 0; row < MANY; row++) {
            sums[leaf][row][lane] = leaf_of(own + row * PART + leaf * LEAF, weights);
        }
        __syncthreads();
        float sum = 0.0f;
        UNROLL for (int n = 0; n < LEAVES; n++) sum += sums[n][leaf][lane];
        total += sum;
        if (more) {
            x[(part + 1) % 2][threadIdx.x] = one;
            x[(part + 1) % 2][next] = two;
            UNROLL for (int j = 0; j < LEAF; j++) weights[j] = coming[j];
        }
    }
    i64 row = first + leaf;
    if (row < call.batch * call.tokens && column < W) call.work[row * W + column] = proposed(total, column);
}

// ---- The corrections

// What a correction adds to one column of one row.
INSIDE float delta_of(const Call *call, i64 column, const float *reads) {
    const float *weights = call->corrections + column;
    float sum = 0.0f;
    for (int i = 0; i < R; i++) sum = fmaf(reads[i], weights[i * call->columns], sum);
    return sum;
}

INSIDE float source_of(const Target *target, i64 row, i64 column) {
    return target->source ? widen(target->source[row * target->stride + target->begin + column]) : 0.0f;
}

// A whole row of a target whose correction has a norm of its own, by a block of `threads`; WIDE of them sum, so that the order is always the same.
INSIDE void normed(const Call *call, const Target *target, i64 row, const float *reads, float *sums, int threads) {
    const Correction own = target->corrections[0];
    if (threadIdx.x < WIDE) {
        float squares = 0.0f;
        for (i64 n = threadIdx.x; n < own.width; n += WIDE) {
            float delta = delta_of(call, own.from + n, reads);
            squares = fmaf(delta, delta, squares);
        }
        sums[threadIdx.x] = squares;
    }
    __syncthreads();
    for (int half = WIDE / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    float factor = 1.0f / sqrtf(sums[0] / (float)own.width + target->epsilon);
    for (i64 column = threadIdx.x; column < target->width; column += threads) {
        float value = source_of(target, row, column);
        i64 n = column - own.start;
        if (n >= 0 && n < own.width) value += delta_of(call, own.from + n, reads) * (factor * target->norm[n]);
        target->out[row * target->width + column] = narrow(value);
    }
}

// Which target a row's slice belongs to; the slice becomes its number among the target's own.
INSIDE const Target *target_of(const Call *call, i64 *slice) {
    const Target *target = call->target;
    while (*slice >= target->slices) *slice -= (target++)->slices;
    return target;
}

// Whether anything is laid on columns `first` to `end`.
INSIDE int is_corrected(const Target *target, i64 first, i64 end) {
    int found = 0;
    for (int c = 0; c < target->count; c++) {
        const Correction *own = &target->corrections[c];
        found |= own->start < end && first < own->start + own->width;
    }
    return found;
}

// What the threads of a block share in a step of one token.
typedef struct {
    float proposal[W];
    ALIGNED(16) float units[2 * R];
    Gate gates[G];
    float reads[R];
    float sums[WIDE];
} Room;

// A thread's own: a column of a target's row, and a row of S.
typedef struct {
    const Target *target;
    i64 row, column;
    int first;         // of the target's corrections, the first on the column; none: -1
    int any;           // whether the layer has targets at all
    int has;           // whether there is such a column
    int first_of_row;  // whether its block writes the state
    float value;
    float kept[RANK];
    float weights[BROUGHT];
} Own;

// What a step does before the sums are there, in blocks of a row's slice of `threads` columns or of the whole row of a target with a norm:
// it brings what does not wait for them. Returns whether anything is left to do.
INSIDE int prepare(const Call *call, int threads, Own *own) {
    i64 blocks = call->slices > 0 ? call->slices : 1, slice = blockIdx.x % blocks;
    own->row = blockIdx.x / blocks;
    own->first_of_row = slice == 0;
    own->any = call->slices > 0;
    own->target = own->any ? target_of(call, &slice) : call->target;
    own->first = -1;
    own->column = slice * threads + threadIdx.x;
    int whole = own->any && own->target->norm;
    own->has = own->any && !whole && own->column < own->target->width;
    own->value = own->has ? source_of(own->target, own->row, own->column) : 0.0f;
    if (!own->first_of_row && !whole && !is_corrected(own->target, slice * threads, slice * threads + threads)) {
        if (own->has) own->target->out[own->row * own->target->width + own->column] = narrow(own->value);
        return 0;
    }
    const float *weights = call->corrections;
    for (int c = own->has ? (int)own->target->count - 1 : -1; c >= 0; c--) {
        i64 n = own->column - own->target->corrections[c].start;
        if (n < 0 || n >= own->target->corrections[c].width) continue;
        own->first = c;
        weights = call->corrections + own->target->corrections[c].from + n;
    }
    UNROLL for (int i = 0; i < BROUGHT; i++) own->weights[i] = own->first >= 0 ? weights[i * call->columns] : 0.0f;
    const float *past = call->past + own->row * call->past_stride;
    UNROLL for (int j = 0; j < RANK; j++) own->kept[j] = RANK <= 16 && threadIdx.x < R ? past[threadIdx.x * RANK + j] : 0.0f;
    return 1;
}

// What a step does when `room->proposal` is there. Each block makes the reads that it needs; the first of a row writes the state.
INSIDE void finish(const Call *call, int threads, Own *own, Room *room) {
    const float *past = call->past + own->row * call->past_stride;
    float *state = call->state + own->row * (R * RANK);
    int writes = call->mask[own->row] != 0.0f;
    for (int n = threadIdx.x; n < 2 * R; n += threads) {
        room->units[n] = NORMALIZE ? room->proposal[n] / length_of(room->proposal + n / RANK * RANK) : room->proposal[n];
    }
    for (int g = threadIdx.x; g < G; g += threads) room->gates[g] = gate_of(room->proposal, call->bias, g);
    __syncthreads();
    for (int i = threadIdx.x; i < R; i += threads) {
        const float *q = room->units + i / RANK * RANK, *k = room->units + R + i / RANK * RANK;
        if (RANK > 16 || i != threadIdx.x) {
            UNROLL for (int j = 0; j < RANK; j++) own->kept[j] = past[i * RANK + j];
        }
        room->reads[i] = recalled(own->kept, q);
        if (own->first_of_row) {
            if (writes) {
                Gate gate = room->gates[i / RANK * GATES + i % RANK % GATES];
                float amount = amount_of(gate.erase, recalled(own->kept, k), gate.write * room->proposal[2 * R + i]);
                UNROLL for (int j = 0; j < RANK; j++) own->kept[j] = moved(amount, k[j], gate.keep, own->kept[j]);
            }
            UNROLL for (int j = 0; j < RANK; j++) state[i * RANK + j] = own->kept[j];
        }
    }
    __syncthreads();
    const Target *target = own->target;
    if (own->any && target->norm) {
        normed(call, target, own->row, room->reads, room->sums, threads);
    } else if (own->has) {
        for (int c = 0; c < target->count; c++) {
            const Correction *one = &target->corrections[c];
            i64 n = own->column - one->start;
            if (n < 0 || n >= one->width) continue;
            if (R <= BROUGHT && c == own->first) {
                float sum = 0.0f;
                UNROLL for (int i = 0; i < BROUGHT; i++) sum = fmaf(room->reads[i], own->weights[i], sum);
                own->value += sum;
            } else {
                own->value += delta_of(call, one->from + n, room->reads);
            }
        }
        target->out[own->row * target->width + own->column] = narrow(own->value);
    }
}

// A step of one token, behind `propose`.
KERNEL(remember, WIDE) {
    __shared__ Room room;
    Own own;
    if (!prepare(&call, WIDE, &own)) return;
    for (int c = threadIdx.x; c < W; c += WIDE) {
        const float *sums = call.work + own.row * call.parts * W + c;
        float total = 0.0f;
        UNROLL_BY(8) for (i64 part = 0; part < call.parts; part++) total += sums[part * W];
        room.proposal[c] = proposed(total, c);
    }
    __syncthreads();
    finish(&call, WIDE, &own, &room);
}

#if W <= STEP
// A step of one token in one launch, for few sequences and small networks: each block sums the networks for itself, a warp for a part and
// COLUMNS columns.
KERNEL(step, STEP) {
    __shared__ Room room;
    __shared__ ALIGNED(16) float x[2][STEP / 32][PART];
    __shared__ float sums[SMALL / PART + W];
    Own own;
    if (!prepare(&call, STEP, &own)) return;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tasks = (int)call.parts * COLUMN_TILES;
    for (int first = 0, side = 0; first < tasks; first += STEP / 32, side = 1 - side) {
        int task = first + warp, part = task % (int)call.parts, column = task / (int)call.parts * COLUMNS + lane;
        float weights[PART];
        UNROLL for (int leaf = 0; leaf < LEAVES; leaf++) {
            weights_of(&call, part, leaf, task < tasks ? column : W, weights + leaf * LEAF);
        }
        for (int n = lane; n < PART; n += 32) {
            i64 d = (i64)part * PART + n;
            x[side][warp][n] = d < call.width ? widen(call.hidden[own.row * call.width + d]) : 0.0f;
        }
        __syncthreads();
        float sum = 0.0f;
        UNROLL for (int leaf = 0; leaf < LEAVES; leaf++) {
            sum += leaf_of(x[side][warp] + leaf * LEAF, weights + leaf * LEAF);
        }
        if (task < tasks && column < W) sums[part * W + column] = sum;
    }
    __syncthreads();
    if (threadIdx.x < W) {
        float total = 0.0f;
        for (int part = 0; part < (int)call.parts; part++) total += sums[part * W + threadIdx.x];
        room.proposal[threadIdx.x] = proposed(total, threadIdx.x);
    }
    __syncthreads();
    finish(&call, STEP, &own, &room);
}
#endif

// A row's gates of one token, in a prompt.
typedef struct ALIGNED(16) {
    float keep, erase;
    float written;  // write times v
    float writes;   // whether the token writes at all
} Prepared;

// What a block holds of a tile of tokens.
typedef struct {
    ALIGNED(16) float q[TILE][PADDED];
    ALIGNED(16) float k[TILE][PADDED];
    Prepared gates[TILE][RANK];
} Tile;

// A prompt, behind `propose_many`: the states through all tokens, one block for a head of a sequence. A thread has a row of S in registers.
// The tokens pass by in tiles: PREPARING threads bring one, RANK others take the state through the one before (each token waits for the last
// one's S k, and for nothing else), and as many take a copy of it through the one before that with the amounts that these found, and
// read. What is read takes the place of q in `work`.
KERNEL(scan, 2 * SCANNING + PREPARING) {
    __shared__ Tile kept[3];
    __shared__ float amounts[2][TILE][RANK];
    i64 b = blockIdx.x / HEADS, tiles = (call.tokens + TILE - 1) / TILE;
    int head = blockIdx.x % HEADS, group = (int)threadIdx.x / SCANNING, i = (int)threadIdx.x % SCANNING;
    int moves = group == 0 && i < RANK, reads = group == 1 && i < RANK, helper = (int)threadIdx.x - 2 * SCANNING;
    float *proposals = call.work + b * call.tokens * W;
    float row[RANK];
    UNROLL for (int j = 0; j < RANK; j++) {
        row[j] = moves || reads ? call.past[b * call.past_stride + (head * RANK + i) * RANK + j] : 0.0f;
    }
    for (i64 tile = -1; tile <= tiles; tile++) {
        // Of the tile that comes, the one that is moved through, or the one that is read.
        i64 own = helper >= 0 ? tile + 1 : group == 0 ? tile : tile - 1;
        i64 first = own * TILE, left = call.tokens - first;
        int count = own < 0 || left < 0 ? 0 : left < TILE ? (int)left : TILE;
        Tile *at = &kept[(own + 3) % 3];
        if (helper >= 0) {
            for (int n = helper; n < 2 * count; n += PREPARING) {
                int token = n / 2;
                const float *from = proposals + (first + token) * W + (n % 2 * HEADS + head) * RANK;
                float *unit = n % 2 ? at->k[token] : at->q[token];
                float vector[RANK];
                UNROLL for (int j = 0; j < RANK; j++) vector[j] = from[j];
                float length = NORMALIZE ? length_of(vector) : 1.0f;
                UNROLL for (int j = 0; j < RANK; j++) unit[j] = NORMALIZE ? vector[j] / length : vector[j];
            }
            for (int n = helper; n < count * RANK; n += PREPARING) {
                int token = n / RANK, r = n % RANK;
                const float *from = proposals + (first + token) * W;
                Gate gate = gate_of(from, call.bias, head * GATES + r % GATES);
                Prepared *to = &at->gates[token][r];
                to->keep = gate.keep;
                to->erase = gate.erase;
                to->written = gate.write * from[2 * R + head * RANK + r];
                to->writes = call.mask[b * call.tokens + first + token];
            }
        } else if (count > 0 && moves) {
            // One token ahead, so that none waits for what the block holds.
            float key[RANK], next_key[RANK];
            Prepared gate = at->gates[0][i];
            UNROLL for (int j = 0; j < RANK; j++) key[j] = at->k[0][j];
            for (int token = 0; token < count; token++) {
                int next = token + 1 < count ? token + 1 : token;
                Prepared next_gate = at->gates[next][i];
                UNROLL for (int j = 0; j < RANK; j++) next_key[j] = at->k[next][j];
                float amount = amount_of(gate.erase, recalled(row, key), gate.written);
                amounts[own % 2][token][i] = amount;
                if (gate.writes != 0.0f) {
                    UNROLL for (int j = 0; j < RANK; j++) row[j] = moved(amount, key[j], gate.keep, row[j]);
                }
                gate = next_gate;
                UNROLL for (int j = 0; j < RANK; j++) key[j] = next_key[j];
            }
        } else if (count > 0 && reads) {
            float q[RANK], next_q[RANK], key[RANK];
            UNROLL for (int j = 0; j < RANK; j++) q[j] = at->q[0][j];
            for (int token = 0; token < count; token++) {
                int next = token + 1 < count ? token + 1 : token;
                Prepared gate = at->gates[token][i];
                float amount = amounts[own % 2][token][i];
                UNROLL for (int j = 0; j < RANK; j++) key[j] = at->k[token][j];
                UNROLL for (int j = 0; j < RANK; j++) next_q[j] = at->q[next][j];
                proposals[(first + token) * W + head * RANK + i] = recalled(row, q);
                if (gate.writes != 0.0f) {
                    UNROLL for (int j = 0; j < RANK; j++) row[j] = moved(amount, key[j], gate.keep, row[j]);
                }
                UNROLL for (int j = 0; j < RANK; j++) q[j] = next_q[j];
            }
        }
        __syncthreads();
    }
    if (moves) {
        float *state = call.state + (b * HEADS + head) * (RANK * RANK) + i * RANK;
        UNROLL for (int j = 0; j < RANK; j++) state[j] = row[j];
    }
}

// A prompt, behind `scan`: corrections of ROWS rows and EACH columns a thread; EACH neighbours come and go together.
#if ELEMENT == 0
#define FOUR_BYTES 16
#else
#define FOUR_BYTES 8
#endif
typedef struct ALIGNED(FOUR_BYTES) {
    Number at[4];
} Four;
typedef struct ALIGNED(16) {
    float at[4];
} FourFloats;

#define CORRECT(name, EACH, LOAD, LOAD_WEIGHTS, STORE)                                                             \
    KERNEL(name, WIDE) {                                                                                           \
        __shared__ float reads[ROWS][R];                                                                           \
        i64 rows = call.batch * call.tokens, slice = blockIdx.x % call.slices, first = blockIdx.x / call.slices * ROWS; \
        int count = rows - first < ROWS ? (int)(rows - first) : ROWS;                                              \
        const Target *target = target_of(&call, &slice);                                                           \
        i64 from = slice * (WIDE * EACH), column = from + threadIdx.x * EACH;                                      \
        float values[ROWS][EACH];                                                                                  \
        UNROLL for (int n = 0; n < ROWS; n++) {                                                                    \
            UNROLL for (int e = 0; e < EACH; e++) values[n][e] = 0.0f;                                             \
            if (target->source && n < count && column < target->width) {                                           \
                const Number *own = target->source + (first + n) * target->stride + target->begin + column;        \
                LOAD(own, values[n]);                                                                              \
            }                                                                                                      \
        }                                                                                                          \
        if (is_corrected(target, from, from + WIDE * EACH)) {                                                      \
            for (int n = threadIdx.x; n < count * R; n += WIDE) {                                                  \
                reads[n / R][n % R] = call.work[(first + n / R) * W + n % R];                                      \
            }                                                                                                      \
            __syncthreads();                                                                                       \
            for (int c = 0; c < target->count; c++) {                                                              \
                i64 own = column - target->corrections[c].start;                                                   \
                if (own < 0 || own >= target->corrections[c].width || column >= target->width) continue;           \
                const float *weights = call.corrections + target->corrections[c].from + own;                       \
                float sums[ROWS][EACH];                                                                            \
                UNROLL for (int n = 0; n < ROWS; n++) {                                                            \
                    UNROLL for (int e = 0; e < EACH; e++) sums[n][e] = 0.0f;                                       \
                }                                                                                                  \
                for (int i = 0; i < R; i++) {                                                                      \
                    float w[EACH];                                                                                 \
                    LOAD_WEIGHTS(weights + i * call.columns, w);                                                   \
                    UNROLL for (int n = 0; n < ROWS; n++) {                                                        \
                        float read = n < count ? reads[n][i] : 0.0f;                                               \
                        UNROLL for (int e = 0; e < EACH; e++) sums[n][e] = fmaf(read, w[e], sums[n][e]);           \
                    }                                                                                              \
                }                                                                                                  \
                UNROLL for (int n = 0; n < ROWS; n++) {                                                            \
                    UNROLL for (int e = 0; e < EACH; e++) values[n][e] += sums[n][e];                              \
                }                                                                                                  \
            }                                                                                                      \
        }                                                                                                          \
        if (column < target->width) {                                                                              \
            UNROLL for (int n = 0; n < ROWS; n++) {                                                                \
                if (n < count) {                                                                                   \
                    Number *own = target->out + (first + n) * target->width + column;                              \
                    STORE(own, values[n]);                                                                         \
                }                                                                                                  \
            }                                                                                                      \
        }                                                                                                          \
    }

#define ONE_IN(from, into) ((into)[0] = widen((from)[0]))
#define ONE_WEIGHT(from, into) ((into)[0] = (from)[0])
#define ONE_OUT(to, values) ((to)[0] = narrow((values)[0]))
#define FOUR_IN(from, into)                                              \
    do {                                                                 \
        Four four = *(const Four *)(from);                               \
        UNROLL for (int e = 0; e < 4; e++) (into)[e] = widen(four.at[e]); \
    } while (0)
#define FOUR_WEIGHTS(from, into)                                  \
    do {                                                          \
        FourFloats four = *(const FourFloats *)(from);            \
        UNROLL for (int e = 0; e < 4; e++) (into)[e] = four.at[e]; \
    } while (0)
#define FOUR_OUT(to, values)                                               \
    do {                                                                   \
        Four four;                                                         \
        UNROLL for (int e = 0; e < 4; e++) four.at[e] = narrow((values)[e]); \
        *(Four *)(to) = four;                                              \
    } while (0)

CORRECT(correct, 1, ONE_IN, ONE_WEIGHT, ONE_OUT)
// Where widths, places and addresses are multiples of four numbers.
CORRECT(correct_fours, 4, FOUR_IN, FOUR_WEIGHTS, FOUR_OUT)

// A prompt: rows of the target whose correction has a norm of its own, one block for each.
KERNEL(correct_normed, WIDE) {
    __shared__ float reads[R];
    __shared__ float sums[WIDE];
    i64 row = blockIdx.x;
    const Target *target = call.target;
    while (!target->norm) target++;
    for (int i = threadIdx.x; i < R; i += WIDE) reads[i] = call.work[row * W + i];
    __syncthreads();
    normed(&call, target, row, reads, sums, WIDE);
}
