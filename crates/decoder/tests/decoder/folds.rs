//! Each fold, applied with random scales, leaves the block's output unchanged.

use candle_core::{Device, Tensor};
use lite_decoder::{AttnSpec, Block, Fold, Glu, MlaSpec, MlpSpec, NoTap, Producer, Rope, SiteId, Stream};

use crate::fixture::{CASES, Fixture, Random, values};

fn tensor(values: Vec<f32>, like: &Tensor) -> Tensor {
    Tensor::from_vec(values, like.shape(), &Device::Cpu).unwrap()
}

/// One scale per channel of the fold's input; channels that share a producer row share theirs if `tied`.
fn scales(fold: &Fold, channels: usize, random: &mut Random, tied: bool) -> Vec<f32> {
    let mut draw = || 2f32.powf(4.0 * random.next() - 2.0);
    match &fold.producer {
        Producer::Rows { rows, .. } if tied => {
            assert_eq!(rows.len(), channels);
            let per_row: Vec<f32> = (0..=*rows.iter().max().unwrap()).map(|_| draw()).collect();
            rows.iter().map(|row| per_row[*row as usize]).collect()
        }
        _ => (0..channels).map(|_| draw()).collect(),
    }
}

/// The producer's output divided by `scales`.
fn divide(block: &mut Block, producer: &Producer, scales: &[f32]) {
    match producer {
        Producer::Norm { weight, bias, kind } => {
            let old = block.vector(weight).unwrap().clone();
            let new = values(&old).iter().zip(scales).map(|(w, s)| kind.rescaled(*w, *s)).collect();
            block.set_vector(weight, tensor(new, &old)).unwrap();
            if let Some(bias) = bias {
                let old = block.vector(bias).unwrap().clone();
                let new = values(&old).iter().zip(scales).map(|(b, s)| b / s).collect();
                block.set_vector(bias, tensor(new, &old)).unwrap();
            }
        }
        Producer::Rows { site, rows } => {
            let old = block.weight(site.role).unwrap().clone();
            let (height, width) = old.dims2().unwrap();
            let mut per_row = vec![1f32; height];
            rows.iter().zip(scales).for_each(|(row, s)| per_row[*row as usize] = *s);
            let new = values(&old).iter().enumerate().map(|(i, w)| w / per_row[i / width]).collect();
            block.set_weight(site.role, tensor(new, &old)).unwrap();
            if let Some(old) = block.bias(site.role).cloned() {
                let new = values(&old).iter().zip(&per_row).map(|(b, s)| b / s).collect();
                block.set_bias(site.role, tensor(new, &old)).unwrap();
            }
        }
    }
}

/// The consumers' columns multiplied by `scales`.
fn multiply(block: &mut Block, consumers: &[SiteId], scales: &[f32]) {
    for consumer in consumers {
        let old = block.weight(consumer.role).unwrap().clone();
        let width = old.dim(1).unwrap();
        assert_eq!(width, scales.len());
        let new = values(&old).iter().enumerate().map(|(i, w)| w * scales[i % width]).collect();
        block.set_weight(consumer.role, tensor(new, &old)).unwrap();
    }
}

/// The columns of what is never quantized, a router, multiplied by `scales`.
fn multiply_plain(block: &mut Block, tensors: &[String], scales: &[f32]) {
    for name in tensors {
        let old = block.vector(name).unwrap().clone();
        let new = values(&old).iter().enumerate().map(|(i, w)| w * scales[i % scales.len()]).collect();
        block.set_vector(name, tensor(new, &old)).unwrap();
    }
}

fn latents(attn: &AttnSpec) -> Option<&MlaSpec> {
    match attn {
        AttnSpec::Mla(mla) => Some(mla),
        _ => None,
    }
}

/// Largest difference over the largest value.
fn relative_difference(a: &Tensor, b: &Tensor) -> f32 {
    let (a, b) = (values(a), values(b));
    let most = a.iter().map(|v| v.abs()).fold(0f32, f32::max);
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / most
}

#[test]
fn folds_leave_the_output_unchanged() {
    for case in CASES {
        let fixture = Fixture::open(case);
        let windows = &fixture.batches[0].windows;
        let x = fixture.embed(windows);
        let rope = Rope::new(&fixture.spec, windows[0].len(), &Device::Cpu).unwrap();
        for index in 0..fixture.spec.blocks.len() {
            let spec = &fixture.spec.blocks[index];
            let original = fixture.block(index);
            let wanted = original.forward(&x, &rope, &mut NoTap).unwrap();
            let streams: Vec<Stream> = spec.folds.iter().map(|fold| fold.input.stream).collect();
            // Nothing rescales the residual stream itself, and nothing passes through the nonlinearity without a gate.
            let gated = matches!(spec.mlp, MlpSpec::Gated(_));
            let (mla, moe) = (latents(&spec.attn), spec.moe());
            let mut possible = vec![
                (Stream::AttnIn, spec.norms.attn.is_some()),
                (Stream::QLatent, mla.is_some_and(|mla| mla.q_latent.is_some())),
                (Stream::KvLatent, mla.is_some()),
                (Stream::AttnOut, true),
                (Stream::MlpIn, spec.norms.mlp.is_some()),
                (Stream::MlpMid, gated),
                (Stream::SharedMid, moe.is_some_and(|moe| moe.shared.is_some())),
            ];
            // A clamped unit is not proportional to up.
            let proportional = moe.is_some_and(|moe| matches!(moe.glu, Glu::Product(_)));
            assert_eq!(moe.is_some() && !proportional, *case == "gpt-oss");
            let experts = 0..moe.map_or(0, |moe| moe.experts as u32);
            possible.extend(experts.map(|e| (Stream::ExpertMid(e), proportional)));
            let routing = moe.map(|_| original.route(&original.feed_forward_input(&x, &rope).unwrap()).unwrap());
            assert!(streams.into_iter().eq(possible.iter().filter(|(_, exact)| *exact).map(|(at, _)| *at)), "{case}");
            for fold in &spec.folds {
                let reads = |stream: Stream| match (fold.input.stream, moe) {
                    // Experts read rows of it.
                    (Stream::MlpIn, Some(_)) => matches!(stream, Stream::MlpIn | Stream::ExpertIn(_)),
                    (input, _) => stream == input,
                };
                let readers = spec.sites.iter().filter(|site| reads(site.input.stream));
                assert!(readers.map(|site| site.id).eq(fold.consumers.iter().copied()), "{case}");
                let channels = spec.site(fold.consumers[0].role).unwrap().in_features;
                let mut random = Random(index as u64 + 1);
                let scales = scales(fold, channels, &mut random, true);
                let difference = |consumed: &[f32]| {
                    let mut block = original.clone();
                    divide(&mut block, &fold.producer, &scales);
                    multiply(&mut block, &fold.consumers, consumed);
                    multiply_plain(&mut block, &fold.plain_consumers, consumed);
                    relative_difference(&wanted, &block.forward(&x, &rope, &mut NoTap).unwrap())
                };
                let exact = difference(&scales);
                assert!(exact <= 1e-5, "{case}, {}: {exact}", fold.input);
                // One channel with another scale is seen.
                let mut wrong = scales.clone();
                wrong[channels / 2] *= 4.0;
                let seen = difference(&wrong);
                let reached = match fold.input.stream {
                    Stream::ExpertMid(e) => routing.as_ref().is_some_and(|routing| !routing.rows(e).0.is_empty()),
                    _ => true,
                };
                assert!(!reached || seen > 1e-3, "{case}, {}: {seen}", fold.input);
            }
        }
    }
}

#[test]
fn grouped_heads_share_the_rows_of_their_value_head() {
    let fixture = Fixture::open("internlm2-dynamic");
    let spec = &fixture.spec.blocks[0];
    let AttnSpec::Gqa(attn) = &spec.attn else { panic!("not grouped-query attention") };
    assert_eq!((attn.heads, attn.kv_heads, attn.head_dim), (6, 2, 8));
    let Producer::Rows { rows, .. } = &spec.folds[1].producer else { panic!("v → o has no rows") };
    // wqkv per key head: three query heads, the key head, the value head, of 8 rows each.
    for (channel, row) in rows.iter().enumerate() {
        let kv_head = channel / 24;
        assert_eq!(*row as usize, kv_head * 40 + 32 + channel % 8);
    }
    // Scales that are not shared cannot be absorbed.
    let windows = &fixture.batches[0].windows;
    let x = fixture.embed(windows);
    let rope = Rope::new(&fixture.spec, windows[0].len(), &Device::Cpu).unwrap();
    let mut block = fixture.block(0);
    let wanted = block.forward(&x, &rope, &mut NoTap).unwrap();
    let scales = scales(&spec.folds[1], 48, &mut Random(5), false);
    divide(&mut block, &spec.folds[1].producer, &scales);
    multiply(&mut block, &spec.folds[1].consumers, &scales);
    assert!(relative_difference(&wanted, &block.forward(&x, &rope, &mut NoTap).unwrap()) > 1e-2);
}
