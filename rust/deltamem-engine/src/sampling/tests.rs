#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

/// Everything off, temperature 1: plain draws from the softmax.
const PLAIN: SamplingOptions = SamplingOptions {
    temperature: 1.0,
    top_p: 1.0,
    top_k: 0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    seed: None,
};
const GREEDY: SamplingOptions = SamplingOptions {
    temperature: 0.0,
    ..PLAIN
};

/// Logits that look drawn and are the same everywhere.
fn logits(vocab: usize) -> Vec<f32> {
    (0..vocab)
        .map(|i| ((i * 7919 + 13) % 1009) as f32 / 150.0 - 3.0)
        .collect()
}

/// The softmax of `logits` / temperature in f64, by the plain formula.
fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
    let weights: Vec<f64> = logits
        .iter()
        .map(|&logit| (f64::from(logit) / temperature).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / total).collect()
}

/// The tokens that come out of `draws` draws, ascending.
fn support(options: &SamplingOptions, logits: &[f32], draws: usize) -> Vec<i32> {
    let mut sampler = Sampler::new(1);
    let mut tokens: Vec<i32> = (0..draws)
        .map(|_| sampler.sample(options, logits, &[]).unwrap())
        .collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

/// The tokens that stay in play, ascending, as the formulas have it: in the order top-k, top-p, min-p, each over what the one before left.
fn naive_support(options: &SamplingOptions, logits: &[f32]) -> Vec<i32> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if options.top_k > 0 {
        order.truncate(options.top_k);
    }
    let left: Vec<f32> = order.iter().map(|&token| logits[token]).collect();
    let probabilities = softmax(&left, options.temperature);
    let mut before = 0.0;
    let mut kept = Vec::new();
    for (&token, &probability) in order.iter().zip(&probabilities) {
        if before < options.top_p && probability >= options.min_p * probabilities[0] {
            kept.push(i32::try_from(token).unwrap());
        }
        before += probability;
    }
    kept.sort_unstable();
    kept
}

#[test]
fn the_stream_is_the_same_on_every_machine_and_in_every_version() {
    // A change here means that old seeds and snapshots give other texts: do not accept it with a dependency's update.
    let mut sampler = Sampler::new(42);
    assert_eq!(sampler.state().seed[..8], [177, 153, 16, 130, 219, 192, 124, 236]);
    let drawn: Vec<i32> = (0..12)
        .map(|_| sampler.sample(&PLAIN, &logits(1000), &[]).unwrap())
        .collect();
    let all = SamplingOptions {
        temperature: 0.8,
        top_p: 0.95,
        top_k: 50,
        min_p: 0.02,
        repetition_penalty: 1.1,
        seed: None,
    };
    let filtered: Vec<i32> = (0..12)
        .map(|i| sampler.sample(&all, &logits(1000), &[i, 100 + i]).unwrap())
        .collect();
    assert_eq!(drawn, [786, 801, 411, 396, 653, 403, 833, 687, 324, 81, 911, 132]);
    assert_eq!(
        filtered,
        [963, 851, 653, 376, 462, 429, 752, 719, 884, 686, 897, 152]
    );
    assert_eq!(sampler.state().position, 48);
}

#[test]
fn the_same_seed_gives_the_same_tokens_and_another_seed_others() {
    let draw = |sampler: &mut Sampler| -> Vec<i32> {
        (0..50)
            .map(|_| sampler.sample(&PLAIN, &logits(500), &[]).unwrap())
            .collect()
    };
    let first = draw(&mut Sampler::new(7));
    assert_eq!(first, draw(&mut Sampler::new(7)));
    assert_ne!(first, draw(&mut Sampler::new(8)));
    let mut reseeded = Sampler::new(99);
    draw(&mut reseeded);
    reseeded.reseed(7);
    assert_eq!(first, draw(&mut reseeded));
    assert_ne!(
        draw(&mut Sampler::from_entropy()),
        draw(&mut Sampler::from_entropy())
    );
}

#[test]
fn a_restored_sampler_continues_bit_for_bit_from_any_position() {
    let mut sampler = Sampler::new(3);
    for _ in 0..200 {
        let mut restored = Sampler::from_state(sampler.state());
        assert_eq!(restored.state(), sampler.state());
        let mut ahead = sampler.clone();
        for _ in 0..40 {
            assert_eq!(
                restored.sample(&PLAIN, &logits(300), &[]),
                ahead.sample(&PLAIN, &logits(300), &[])
            );
        }
        assert_eq!(restored.state(), ahead.state());
        sampler.sample(&PLAIN, &logits(300), &[]).unwrap();
    }
}

#[test]
fn odd_and_last_positions_of_a_stream_are_positions_too() {
    for position in [
        1,
        63,
        65,
        (1 << 36) + 7,
        SamplerState::POSITIONS - 1,
        SamplerState::POSITIONS - 2,
    ] {
        let state = SamplerState {
            seed: [5; 32],
            position,
        };
        let (mut one, mut other) = (Sampler::from_state(state), Sampler::from_state(state));
        assert_eq!(one.state(), state);
        for _ in 0..100 {
            assert_eq!(
                one.sample(&PLAIN, &logits(100), &[]),
                other.sample(&PLAIN, &logits(100), &[])
            );
            other = Sampler::from_state(other.state());
        }
        assert_eq!(one.state().position, (position + 200) % SamplerState::POSITIONS);
    }
}

#[test]
fn greedy_takes_the_lowest_id_of_the_largest_and_leaves_the_stream() {
    let mut sampler = Sampler::new(1);
    let before = sampler.state();
    assert_eq!(sampler.sample(&GREEDY, &[0.5, 2.0, -1.0, 2.0], &[]), Ok(1));
    assert_eq!(sampler.sample(&GREEDY, &[f32::NEG_INFINITY, -1e30], &[]), Ok(1));
    assert_eq!(sampler.sample(&GREEDY, &[-0.0, 0.0], &[]), Ok(0));
    assert_eq!(sampler.state(), before);
}

#[test]
fn a_temperature_close_to_zero_is_greedy_and_does_not_overflow() {
    for temperature in [1e-300, 1e-12, 1e-3] {
        let options = SamplingOptions { temperature, ..PLAIN };
        assert_eq!(support(&options, &[-3e38, 1.0, 3e38, 2.0], 50), [2]);
    }
    // Equal logits stay equally likely however cold it is.
    assert_eq!(
        support(
            &SamplingOptions {
                temperature: 1e-300,
                ..PLAIN
            },
            &[1.0, 7.0, 7.0],
            50
        ),
        [1, 2]
    );
}

#[test]
fn frequencies_are_the_softmax() {
    let logits = [0.3_f32, -1.0, 2.0, 0.0, 1.1, -2.5, 0.7, 1.9];
    for (temperature, draws) in [(1.0, 20_000_u32), (0.7, 20_000), (2.5, 20_000)] {
        let options = SamplingOptions { temperature, ..PLAIN };
        let mut counts = [0_u32; 8];
        let mut sampler = Sampler::new(11);
        for _ in 0..draws {
            counts[usize::try_from(sampler.sample(&options, &logits, &[]).unwrap()).unwrap()] += 1;
        }
        let chi_square: f64 = counts
            .iter()
            .zip(softmax(&logits, temperature))
            .map(|(&count, probability)| {
                let expected = probability * f64::from(draws);
                (f64::from(count) - expected).powi(2) / expected
            })
            .sum();
        // The 99.9th percentile with 7 degrees of freedom; the seed is fixed, so this either always holds or never.
        assert!(
            chi_square < 24.32,
            "χ² = {chi_square} at temperature {temperature}: {counts:?}"
        );
    }
}

#[test]
fn top_k_keeps_k_tokens_and_the_lowest_ids_among_equals() {
    let top = |top_k| SamplingOptions {
        top_k,
        temperature: 5.0,
        ..PLAIN
    };
    let equal = [1.0_f32; 6];
    assert_eq!(support(&top(1), &[0.0, 3.0, 3.0], 50), [1]);
    assert_eq!(support(&top(3), &equal, 500), [0, 1, 2]);
    assert_eq!(support(&top(2), &[0.0, 1.0, 5.0, 1.0, 1.0], 500), [1, 2]);
    assert_eq!(support(&top(6), &equal, 500), support(&top(0), &equal, 500));
    assert_eq!(support(&top(usize::MAX), &equal, 500).len(), 6);
}

#[test]
fn top_p_keeps_the_fewest_tokens_that_reach_it() {
    // Probabilities .5, .25, .125, .125.
    let logits: Vec<f32> = [8.0_f32, 4.0, 2.0, 2.0].iter().map(|x| x.ln()).collect();
    let top = |top_p| SamplingOptions { top_p, ..PLAIN };
    assert_eq!(support(&top(0.4), &logits, 300), [0]);
    assert_eq!(support(&top(0.6), &logits, 300), [0, 1]);
    assert_eq!(support(&top(0.8), &logits, 300), [0, 1, 2]);
    assert_eq!(support(&top(0.95), &logits, 300), [0, 1, 2, 3]);
    assert_eq!(support(&top(f64::MIN_POSITIVE), &logits, 300), [0]);
}

#[test]
fn min_p_keeps_what_is_likely_enough_against_the_best() {
    let logits: Vec<f32> = [8.0_f32, 4.0, 2.0, 1.0].iter().map(|x| x.ln()).collect();
    let min = |min_p| SamplingOptions { min_p, ..PLAIN };
    assert_eq!(support(&min(1.0), &logits, 300), [0]);
    assert_eq!(support(&min(0.3), &logits, 300), [0, 1]);
    assert_eq!(support(&min(0.2), &logits, 300), [0, 1, 2]);
    assert_eq!(support(&min(0.01), &logits, 300), [0, 1, 2, 3]);
}

#[test]
fn the_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_negative() {
    let penalised = |repetition_penalty, logits: &[f32], recent: &[i32]| {
        Sampler::new(1)
            .sample(
                &SamplingOptions {
                    repetition_penalty,
                    ..GREEDY
                },
                logits,
                recent,
            )
            .unwrap()
    };
    assert_eq!(penalised(1.0, &[3.0, 2.0], &[0]), 0);
    assert_eq!(penalised(2.0, &[3.0, 2.0], &[0]), 1);
    // Once, however often the token came.
    assert_eq!(penalised(1.2, &[3.0, 2.0], &[0; 50]), 0);
    assert_eq!(penalised(2.0, &[-1.0, -1.5], &[0]), 1);
    assert_eq!(penalised(0.5, &[-1.5, -1.0], &[0]), 0);
    // Ids that no vocabulary has are nobody's.
    assert_eq!(
        penalised(2.0, &[3.0, 2.0], &[-1, i32::MIN, i32::MAX, 2, 64, 1000]),
        0
    );
}

#[test]
fn a_penalty_does_not_outlive_its_call() {
    let mut sampler = Sampler::new(1);
    let options = SamplingOptions {
        repetition_penalty: 10.0,
        ..GREEDY
    };
    assert_eq!(sampler.sample(&options, &[3.0, 2.0], &[0]), Ok(1));
    assert_eq!(sampler.sample(&options, &[3.0, 2.0], &[]), Ok(0));
    assert!(sampler.sample(&options, &[f32::NAN, 2.0], &[0]).is_err());
    assert_eq!(sampler.sample(&options, &[3.0, 2.0], &[]), Ok(0));
}

#[test]
fn no_token_allocates_once_the_buffers_are_warm() {
    let all = SamplingOptions {
        temperature: 0.9,
        top_p: 0.9,
        top_k: 40,
        min_p: 0.01,
        repetition_penalty: 1.2,
        seed: None,
    };
    for options in [PLAIN, all, SamplingOptions { top_k: 0, ..all }] {
        let mut sampler = Sampler::new(5);
        let recent: Vec<i32> = (0..200).collect();
        sampler.sample(&options, &logits(5000), &recent).unwrap();
        let warm = (
            sampler.candidates.as_ptr(),
            sampler.candidates.capacity(),
            sampler.penalised.as_ptr(),
        );
        for _ in 0..20 {
            sampler.sample(&options, &logits(5000), &recent).unwrap();
        }
        assert_eq!(
            warm,
            (
                sampler.candidates.as_ptr(),
                sampler.candidates.capacity(),
                sampler.penalised.as_ptr()
            )
        );
        if options.top_k > 0 {
            assert!(warm.1 <= 4 * options.top_k, "top-k keeps {} candidates", warm.1);
        }
    }
}

#[test]
fn logits_that_cannot_be_sampled_are_refused_and_the_stream_stays() {
    for options in [GREEDY, PLAIN, SamplingOptions { top_k: 1, ..PLAIN }] {
        let mut sampler = Sampler::new(1);
        let before = sampler.state();
        assert_eq!(
            sampler.sample(&options, &[], &[]),
            Err(SamplingError::Count { found: 0 })
        );
        let infinite = SamplingError::NotANumber {
            token: 1,
            value: f32::INFINITY,
        };
        assert_eq!(
            sampler.sample(&options, &[0.0, f32::INFINITY], &[]),
            Err(infinite)
        );
        let error = sampler.sample(&options, &[0.0, 0.0, f32::NAN], &[]).unwrap_err();
        assert!(
            matches!(error, SamplingError::NotANumber { token: 2, .. }),
            "{error}"
        );
        assert_eq!(
            sampler.sample(&options, &[f32::NEG_INFINITY; 3], &[]),
            Err(SamplingError::NothingLeft)
        );
        assert_eq!(sampler.state(), before);
    }
}

#[test]
fn options_out_of_range_are_refused_by_name_value_and_range() {
    let wrong = [
        (
            "temperature",
            SamplingOptions {
                temperature: -0.1,
                ..PLAIN
            },
        ),
        (
            "temperature",
            SamplingOptions {
                temperature: f64::NAN,
                ..PLAIN
            },
        ),
        (
            "temperature",
            SamplingOptions {
                temperature: f64::INFINITY,
                ..PLAIN
            },
        ),
        ("top_p", SamplingOptions { top_p: 0.0, ..PLAIN }),
        ("top_p", SamplingOptions { top_p: 1.01, ..PLAIN }),
        (
            "top_p",
            SamplingOptions {
                top_p: f64::NAN,
                ..PLAIN
            },
        ),
        (
            "min_p",
            SamplingOptions {
                min_p: -0.01,
                ..PLAIN
            },
        ),
        ("min_p", SamplingOptions { min_p: 1.5, ..PLAIN }),
        (
            "min_p",
            SamplingOptions {
                min_p: f64::NAN,
                ..PLAIN
            },
        ),
        (
            "repetition_penalty",
            SamplingOptions {
                repetition_penalty: 0.0,
                ..PLAIN
            },
        ),
        (
            "repetition_penalty",
            SamplingOptions {
                repetition_penalty: f64::NAN,
                ..PLAIN
            },
        ),
    ];
    for (name, options) in wrong {
        let error = options.validate().unwrap_err();
        assert!(error.to_string().starts_with(&format!("{name} is ")), "{error}");
        assert!(Sampler::new(1).sample(&options, &[0.0], &[]).is_err());
    }
    assert_eq!(SamplingOptions::default().validate(), Ok(()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn only_tokens_that_the_options_leave_are_drawn(
        logits in prop::collection::vec(-4.0_f32..4.0, 1..200),
        temperature in 0.2_f64..3.0,
        top_k in 0..60_usize,
        top_p in prop_oneof![Just(1.0), 0.05_f64..1.0],
        min_p in prop_oneof![Just(0.0), 0.0_f64..0.6],
    ) {
        let options = SamplingOptions { temperature, top_p, top_k, min_p, ..PLAIN };
        let allowed = naive_support(&options, &logits);
        let drawn = support(&options, &logits, 60);
        prop_assert!(drawn.iter().all(|token| allowed.contains(token)), "{drawn:?} of {allowed:?}");
        // And the set itself, not only what luck drew from it.
        let mut sampler = Sampler::new(1);
        sampler.sample(&options, &logits, &[]).unwrap();
        let mut left: Vec<i32> = sampler.candidates.iter().map(|candidate| i32::try_from(candidate.token).unwrap()).collect();
        left.sort_unstable();
        prop_assert_eq!(left, allowed);
    }

    #[test]
    fn the_largest_of_many_at_a_time_is_the_largest_one_by_one(
        logits in prop::collection::vec(
            prop_oneof![
                20 => -2.0_f32..2.0,
                10 => (-2_i8..=2).prop_map(f32::from),
                1 => prop::sample::select(vec![-0.0, f32::MAX, f32::NEG_INFINITY]),
            ],
            1..200,
        ),
        odd in prop::option::weighted(0.2, (prop::sample::select(vec![f32::NAN, f32::INFINITY]), any::<prop::sample::Index>())),
    ) {
        let mut logits = logits;
        if let Some((odd, place)) = odd {
            let place = place.index(logits.len());
            logits[place] = odd;
        }
        let mut sampler = Sampler::new(1);
        sampler.mark(&[], logits.len());
        prop_assert_eq!(largest(&logits), sampler.best(&PLAIN, &logits).ok());
    }

    #[test]
    fn a_draw_takes_two_words_whatever_the_options(
        logits in prop::collection::vec(-4.0_f32..4.0, 1..50),
        top_k in 0..10_usize,
        top_p in 0.05_f64..=1.0,
    ) {
        let mut sampler = Sampler::new(9);
        sampler.sample(&SamplingOptions { top_p, top_k, ..PLAIN }, &logits, &[]).unwrap();
        prop_assert_eq!(sampler.state().position, 2);
    }
}

/// The `count` largest, those that equal the last of them as `pick` has it: as a device may bring them.
fn brought(logits: &[f32], count: usize, pick: usize) -> Vec<(u32, f32)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Among equals by any order, not by id.
    order.sort_by(|&a, &b| {
        let other = |id: usize| (id * 7919 + pick) % 1013;
        logits[b].total_cmp(&(logits[a])).then(other(a).cmp(&other(b)))
    });
    order
        .into_iter()
        .take(count)
        .map(|id| (u32::try_from(id).unwrap(), logits[id]))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn the_best_alone_give_the_token_and_the_stream_of_all_or_say_that_they_cannot(
        (numbers, steps) in (prop::collection::vec(-8..9_i32, 1..60), 1..9_i32),
        (top_k, greedy) in (0..40_usize, any::<bool>()),
        (top_p, min_p) in (0.05..1.3_f64, 0.0..0.4_f64),
        (temperature, seed, pick) in (0.1..3.0_f64, any::<u64>(), 0..1000_usize),
        few in any::<bool>(),
    ) {
        // Steps as coarse as this give many equal ones; the lowest stands for a word that is masked.
        let logits: Vec<f32> = numbers
            .iter()
            .map(|&n| if n == -8 { f32::NEG_INFINITY } else { (n / steps) as f32 })
            .collect();
        let options = SamplingOptions {
            temperature: if greedy { 0.0 } else { temperature },
            top_k,
            top_p: top_p.min(1.0),
            min_p: if min_p < 0.1 { 0.0 } else { min_p },
            ..PLAIN
        };
        let vocab = logits.len();
        let Some(most) = options.depends_on(vocab) else {
            prop_assert!(!greedy && (top_k == 0 || top_k >= vocab));
            return Ok(());
        };
        // With none beyond the most, equal ones at the border are met often.
        let count = if few { most.min(vocab) } else { to_bring(most, vocab) };
        let (mut all, mut best) = (Sampler::new(seed), Sampler::new(seed));
        for _ in 0..5 {
            let before = best.state();
            let brought = brought(&logits, count, pick);
            if let Some(token) = best.sample_best(&options, &brought, vocab) {
                prop_assert_eq!(Ok(token), all.sample(&options, &logits, &[]));
                prop_assert_eq!(best.state(), all.state());
            } else {
                prop_assert_eq!(best.state(), before);
                let floor = brought[count - 1].1;
                let nothing = logits.iter().all(|logit| logit.is_infinite());
                // All that equal the last one of the choice may be needed, and are not all known to be here.
                let mut sorted = logits.clone();
                sorted.sort_by(|a, b| b.total_cmp(a));
                prop_assert!(nothing || (count < vocab && sorted[most - 1] <= floor));
            }
        }
    }
}

#[test]
fn the_best_alone_leave_what_needs_a_whole_row_to_it() {
    let mut sampler = Sampler::new(1);
    let top = SamplingOptions { top_k: 2, ..PLAIN };
    let best = [(4, 2.0), (7, 1.0), (1, 0.5)];
    assert!(sampler.sample_best(&top, &best, 100).is_some());
    assert_eq!(sampler.sample_best(&GREEDY, &best, 100), Some(4));
    assert_eq!(sampler.sample_best(&GREEDY, &[(9, -0.0), (3, 0.0)], 2), Some(3));
    let penalty = SamplingOptions {
        repetition_penalty: 1.5,
        ..GREEDY
    };
    for (options, best) in [
        (&PLAIN, &best[..]),
        (&penalty, &best),
        (&SamplingOptions { top_k: 257, ..PLAIN }, &best),
        (&top, &[]),
        (&top, &best[..2]),
        (&GREEDY, &[(4, 2.0), (7, 2.0)]),
        (&GREEDY, &[(4, f32::INFINITY), (7, 2.0)]),
        (&GREEDY, &[(4, f32::NEG_INFINITY), (7, f32::NEG_INFINITY)]),
    ] {
        assert_eq!(
            sampler.sample_best(options, best, 1000),
            None,
            "{options:?} {best:?}"
        );
    }
}
