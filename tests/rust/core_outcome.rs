//! What every request gets, whatever happens to it: tokens, logits, an end.

use std::sync::Arc;

use nano_core::step::{LogitRows, RowAnswer, SampledRow};
use nano_core::{
    Error, Executor, FinishReason, RequestId, RequestKind, SamplingParams, SchedulerConfig, TokenId,
};

use crate::core_run::{Run, VOCAB_SIZE, WIDE, continuation, generate, parts, prompt, request};

#[test]
fn an_aborted_request_frees_its_blocks_and_is_gone() {
    let config = SchedulerConfig { max_num_seqs: 1, ..WIDE };
    let mut run = Run::new(config, 4, 1).with([generate(0, 2, 2), generate(1, 1, 1)]);
    run.step();
    let waiting = run.scheduler.abort(RequestId(1)).unwrap();
    assert_eq!((waiting.request, waiting.finish), (RequestId(1), Some(FinishReason::Abort)));
    assert_eq!((run.stats().num_waiting, run.stats().num_free_blocks), (0, 2));
    let running = run.scheduler.abort(RequestId(0)).unwrap();
    assert!(running.token.is_none() && running.logits.is_none());
    assert_eq!((running.request, running.finish), (RequestId(0), Some(FinishReason::Abort)));
    assert_eq!((run.stats().num_running, run.stats().num_free_blocks), (0, 4));
    assert!(run.scheduler.is_idle());
    assert_eq!(run.scheduler.abort(RequestId(0)), None);
    assert_eq!(run.scheduler.abort(RequestId(7)), None);
    run.scheduler.check_invariants();
}

#[test]
fn a_request_aborted_in_flight_gets_no_token_and_its_blocks_come_back_with_the_step() {
    let mut run = Run::new(WIDE, 3, 1).with([generate(0, 1, 4), generate(1, 2, 1)]);
    run.launch();
    run.scheduler.abort(RequestId(1)).unwrap();
    run.scheduler.check_invariants();
    assert_eq!(run.stats().num_free_blocks, 0);
    let events = run.collect();
    assert_eq!(events.iter().map(|event| event.request.0).collect::<Vec<_>>(), [0]);
    assert_eq!(run.stats().num_free_blocks, 2);
    run.scheduler.abort(RequestId(0)).unwrap();
    assert_eq!(run.stats().num_free_blocks, 3);
}

#[test]
fn a_preempted_request_can_be_aborted() {
    let mut run = Run::new(WIDE, 2, 1).with([generate(0, 1, 2), generate(1, 1, 2)]);
    run.launch();
    run.launch();
    assert_eq!((run.stats().num_preemptions, run.stats().num_waiting), (1, 1));
    run.scheduler.abort(RequestId(1)).unwrap();
    run.collect();
    run.finish();
    assert_eq!(run.finished.keys().copied().collect::<Vec<_>>(), [0]);
}

#[test]
fn a_row_that_failed_ends_its_own_request() {
    let mut run = Run::new(WIDE, 20, 1).with([generate(0, 1, 2), generate(1, 1, 2)]);
    let step = run.launch();
    let mut rows = run.executor.collect().unwrap();
    let error = Error::LogitsNotFinite { position: 1 };
    rows[0].answer = RowAnswer::Error(error.clone());
    let events = run.scheduler.update(&step, rows).unwrap();
    let ended: Vec<_> = events.into_iter().map(|event| (event.request.0, event.finish)).collect();
    assert_eq!(ended, [(0, Some(FinishReason::Error(error))), (1, None)]);
    assert_eq!((run.stats().num_running, run.stats().num_free_blocks), (1, 19));
}

#[test]
fn a_preempted_request_ends_when_its_last_token_arrives() {
    let mut run = Run::new(WIDE, 3, 1).with([generate(0, 1, 3), generate(1, 2, 1)]);
    assert_eq!(parts(&run.launch()), [(0, 0, 1), (1, 0, 2)]);
    assert!(run.launch().sequences.is_empty());
    assert_eq!((run.stats().num_preemptions, run.stats().num_waiting), (1, 1));
    run.collect();
    assert_eq!(run.finished.get(&1), Some(&FinishReason::Length));
    assert_eq!(run.stats().num_waiting, 0);
    assert_eq!(run.tokens[&1], continuation(1, 2, 1));
    run.finish();
    assert_eq!(run.tokens[&0], continuation(0, 1, 3));
}

#[test]
fn a_stop_token_is_the_last_token_and_named() {
    let expected = continuation(0, 3, 4);
    let params = SamplingParams {
        stop_token_ids: Arc::from([expected[3]]),
        max_tokens: 20,
        ..SamplingParams::default()
    };
    let num_tokens = expected.iter().position(|token| *token == expected[3]).unwrap() + 1;
    let mut run = Run::new(WIDE, 50, 1).with([request(0, 3, RequestKind::Generate(params))]);
    run.finish();
    assert_eq!(run.tokens[&0], expected[..num_tokens]);
    assert_eq!(run.finished[&0], FinishReason::Stop(Some(expected[3])));
}

#[test]
fn a_row_computed_past_the_end_is_dropped() {
    let expected = continuation(0, 3, 1);
    let params =
        SamplingParams { stop_token_ids: Arc::from([expected[0]]), ..SamplingParams::default() };
    let mut run = Run::new(WIDE, 50, 1).with([request(0, 3, RequestKind::Generate(params))]);
    run.launch();
    run.launch();
    assert_eq!(run.collect().len(), 1);
    assert_eq!(run.stats().num_free_blocks, 46);
    assert!(run.collect().is_empty());
    assert_eq!((&run.tokens[&0], run.stats().num_free_blocks), (&expected, 50));
}

#[test]
fn stop_tokens_are_banned_only_where_a_row_samples_before_min_tokens() {
    let stop_token_ids: Arc<[TokenId]> = Arc::from([TokenId(3), TokenId(1)]);
    let params =
        SamplingParams { stop_token_ids, max_tokens: 9, min_tokens: 2, ..Default::default() };
    let config = SchedulerConfig { max_num_batched_tokens: 6, ..WIDE };
    let mut run = Run::new(config, 50, 1).with([
        generate(0, 1, 9),
        request(1, 1, RequestKind::Logits),
        request(2, 1, RequestKind::Generate(params.clone())),
        request(3, 5, RequestKind::Generate(params)),
    ]);
    let mut banned = Vec::new();
    for _ in 0..4 {
        let step = run.launch();
        let with_bans = step.sequences.iter().filter(|it| it.banned.is_some());
        banned.push(with_bans.clone().map(|it| it.sequence.0).collect::<Vec<_>>());
        for tokens in with_bans.flat_map(|it| &it.banned) {
            assert_eq!(**tokens, [TokenId(1), TokenId(3)]);
        }
        run.collect();
    }
    assert_eq!(banned, [vec![2], vec![2, 3], vec![3], vec![]]);
}

#[test]
fn bans_push_the_choice_to_another_token() {
    let unbanned = continuation(0, 3, 1)[0];
    let params = SamplingParams {
        stop_token_ids: Arc::from([unbanned]),
        min_tokens: 1,
        max_tokens: 1,
        ..SamplingParams::default()
    };
    let mut run = Run::new(WIDE, 50, 1).with([request(0, 3, RequestKind::Generate(params))]);
    run.finish();
    assert_eq!(run.tokens[&0], [TokenId((unbanned.0 + 1) % VOCAB_SIZE)]);
    assert_eq!(run.finished[&0], FinishReason::Length);
}

/// What the fake delivers as logits of a prompt.
fn prompt_logits(id: u64, len: u32) -> Vec<f32> {
    let row = |token: &TokenId| {
        let zeros = std::iter::repeat_n(0.0, VOCAB_SIZE as usize - 1);
        std::iter::once(token.0 as f32).chain(zeros)
    };
    prompt(id, len).iter().flat_map(row).collect()
}

#[test]
fn logits_of_a_chunked_prompt_arrive_row_by_row() {
    let config = SchedulerConfig { max_num_batched_tokens: 3, ..WIDE };
    let mut run = Run::new(config, 4, 2).with([request(0, 7, RequestKind::Logits)]);
    let mut lens = Vec::new();
    for _ in 0..3 {
        let step = run.launch();
        assert_eq!(step.sequences[0].logit_rows, LogitRows::All);
        let event = run.collect().pop().unwrap();
        assert!(event.token.is_none());
        lens.push(event.logits.unwrap().len() / VOCAB_SIZE as usize);
    }
    assert_eq!(lens, [3, 3, 1]);
    assert_eq!(run.finished[&0], FinishReason::Length);
    assert_eq!(run.logits[&0], prompt_logits(0, 7));
}

#[test]
fn logits_preempted_midway_deliver_each_row_once() {
    let config = SchedulerConfig { max_num_batched_tokens: 5, ..WIDE };
    for num_ahead in 1..=3 {
        let mut run = Run::new(config, 9, 1);
        run = run.with([generate(0, 2, 5), request(1, 9, RequestKind::Logits)]);
        run.finish_ahead(num_ahead);
        assert!(run.stats().num_preemptions > 0, "{num_ahead} ahead");
        assert_eq!(run.tokens[&0], continuation(0, 2, 5), "{num_ahead} ahead");
        assert_eq!(run.logits[&1], prompt_logits(1, 9), "{num_ahead} ahead");
        assert_eq!(run.finished[&1], FinishReason::Length, "{num_ahead} ahead");
    }
}

#[test]
fn an_update_with_wrong_rows_is_an_error_and_changes_no_request() {
    let run = || {
        let mut run = Run::new(WIDE, 20, 1);
        run = run.with([generate(0, 1, 1), request(1, 2, RequestKind::Logits), generate(2, 1, 1)]);
        let step = run.launch();
        (run.scheduler, step, run.executor.collect().unwrap())
    };
    let (mut scheduler, step, rows) = run();
    assert_eq!(scheduler.update(&step, rows).unwrap().len(), 3);

    let break_rows: [fn(&mut Vec<SampledRow>); 5] = [
        |rows| rows.truncate(2),
        |rows| rows.push(rows[2].clone()),
        |rows| rows.swap(0, 2),
        |rows| rows[2].answer = RowAnswer::Logits(vec![0.0]),
        |rows| rows[1].answer = RowAnswer::Token(TokenId(0)),
    ];
    for (index, break_rows) in break_rows.iter().enumerate() {
        let (mut scheduler, step, mut rows) = run();
        break_rows(&mut rows);
        let num_rows = rows.len();
        let error = scheduler.update(&step, rows).unwrap_err();
        let expected =
            format!("executor failed: its {num_rows} rows are not those that the step asked for");
        assert_eq!(error.to_string(), expected, "case {index}");
        assert_eq!(scheduler.stats().num_running, 3, "case {index}");
    }
}
