package workloadapi

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"log/slog"
	"math/rand/v2"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/signet-id/signet/workloadapi/peer"
)

// maxAttempts bounds how often a call is begun anew because the calling process changed meanwhile.
const maxAttempts = 5

// A Feed shows subjects what a Source has for them. The Workload Endpoint has one, and so have endpoints on which others
// speak for workloads. All fields but Source and IssueWait may be zero.
type Feed struct {
	Source Source

	// IssueWait is how long a registered subject waits for its first SVID before its call ends with Unavailable.
	IssueWait time.Duration

	// SpreadUpdates spreads updates that only bring new bundles over this time. Zero sends them at once.
	SpreadUpdates time.Duration

	// BundlesWithoutIdentity lets streams with BundlesOnly go to subjects without an identity, too.
	BundlesWithoutIdentity bool

	// Log gets what operators should know. Nil means nowhere.
	Log *slog.Logger

	// OnPush is told when a stream's message has been sent. It must not block. Nil: nobody is.
	OnPush func(method string)
}

// Answer attests the caller of a unary call, lets f find the answer, and returns nil only if the process is by then still
// the one that f was told about. f runs again for a process that changed.
func (s *Server) Answer(ctx context.Context, f func(Caller) error) error {
	subject, err := s.subject(ctx)
	if err != nil {
		return err
	}
	return s.feed.Answer(ctx, subject, f)
}

// Current returns the caller's state as it is now. See Feed.Current.
func (s *Server) Current(ctx context.Context, caller Caller) (Update, error) {
	return s.feed.Current(ctx, caller)
}

// Follow serves a stream of the process that calls. See Feed.Follow.
func (s *Server) Follow(ctx context.Context, st Stream) error {
	subject, err := s.subject(ctx)
	if err != nil {
		return err
	}
	return s.feed.Follow(ctx, subject, st)
}

// subject is the process that sent a call.
func (s *Server) subject(ctx context.Context) (Subject, error) {
	p, err := peer.FromContext(ctx)
	if err != nil {
		return nil, err
	}
	return ProcessSubject(p, s.cfg.Attestor, s.gate), nil
}

// Answer attests the subject of a unary call, lets f find the answer, and returns nil only if the subject is by then still
// what f was told about. f runs again for a subject that changed.
func (d *Feed) Answer(ctx context.Context, subject Subject, f func(Caller) error) error {
	for range maxAttempts {
		caller, err := subject.Attest(ctx)
		if err != nil {
			return err
		}
		if err := f(caller); err != nil {
			return err
		}
		if err := subject.Check(ctx, caller); !errors.Is(err, ErrSubjectChanged) {
			return err
		}
	}
	return errUnsteady
}

// Current returns the caller's state as it is now, which has at least one identity. The error is ErrNoIdentity if it has
// none.
func (d *Feed) Current(ctx context.Context, caller Caller) (Update, error) {
	ctx, cancel := context.WithTimeout(ctx, d.IssueWait)
	updates, err := d.Source.Watch(ctx, caller)
	if err != nil {
		cancel()
		return Update{}, fmt.Errorf("the caller's identities: %w", err)
	}
	defer drain(cancel, updates)
	for {
		select {
		case u, ok := <-updates:
			switch {
			case !ok && ctx.Err() == nil:
				return Update{}, errSourceEnded
			case !ok:
				return Update{}, errNothingYet
			case len(u.Identities) > 0:
				return u, nil
			case !u.Entitled:
				return Update{}, ErrNoIdentity
			}
		case <-ctx.Done():
			return Update{}, errNothingYet
		}
	}
}

// drain ends a subscription and waits until the source has let go of it.
func drain(cancel context.CancelFunc, updates <-chan Update) {
	cancel()
	for range updates {
	}
}

// A Stream is how one streaming call shows the caller's state.
type Stream struct {
	// Method is the full gRPC method, for metrics and logs.
	Method string

	// Render makes the message for an update. An error means that no sound message can be made: the client keeps what it
	// has, since it would discard half a message too, and the error is logged. ErrNoIdentity ends the stream; what is still
	// on its way is no error.
	Render func(Update) (Message, error)

	// Narrow says what of an update is shown: a copy without the rest. Nil: all of it.
	Narrow func(Update) Update

	// BundlesOnly streams also go to callers without an identity, if the configuration allows it.
	BundlesOnly bool

	// WIT is where the updates of a stream with WIT-SVIDs come from. Nil: it shows none.
	WIT WITSource

	// Spread lets updates that change bundles only be delayed, by up to Feed.SpreadUpdates.
	Spread bool

	// Again, if not nil, has the newest update rendered once more: the client has asked for something else meanwhile.
	// One slot is enough.
	Again <-chan struct{}

	// Ask, if not nil, takes in what the client has asked for since it was last called. It is called when Again says so, and
	// before the subject is looked at, so that no request is answered by a look from before it. An error ends the stream.
	Ask func() error
}

// clientLimit is what gRPC's clients take in one message unless they are told otherwise.
const clientLimit = 4 << 20

// A Message is one rendered update.
type Message struct {
	// Digest is the same if and only if the message is.
	Digest [sha256.Size]byte

	// Size is its length in bytes.
	Size int

	// Send writes the message to the stream. Nil means that there is nothing to say.
	Send func() error
}

// Show renders a protobuf message for a server's stream.
func Show[M any](m *M, ss interface{ Send(*M) error }) (Message, error) {
	pm, ok := any(m).(proto.Message)
	if !ok {
		return Message{}, fmt.Errorf("%T is not a protobuf message", m)
	}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(pm)
	if err != nil {
		return Message{}, fmt.Errorf("encoding a %T: %w", m, err)
	}
	return Message{Digest: sha256.Sum256(raw), Size: len(raw), Send: func() error { return ss.Send(m) }}, nil
}

// Follow serves a stream: the subject's state at once, and again whenever the message would differ from the last one. It
// returns when the call has to end, and with which error. [Workload API §4.2, §4.3]
//
// Before each message the subject is looked at again. A process that has become another program or user is attested
// anew, and goes on with the identities of what it is now.
func (d *Feed) Follow(ctx context.Context, subject Subject, st Stream) error {
	f := newFollower(d, subject, &st)
	for idle := 0; idle < maxAttempts; idle++ {
		f.progress = false
		if err := f.attest(ctx); err != nil {
			return err
		}
		if err := f.subscription(ctx); !errors.Is(err, ErrSubjectChanged) {
			return err
		}
		if f.progress {
			idle = -1
		}
	}
	return errUnsteady
}

// A follower is one stream being served, by one goroutine. There may be ten thousand that wait, so what waits has small
// frames and holds little: what is large is in functions that return first, and what is not needed any more is let go.
type follower struct {
	*Feed
	Stream
	subject  Subject
	caller   Caller
	progress bool // a message was due since the last attestation

	started    bool // a message has been sent
	last       [sha256.Size]byte
	identities [sha256.Size]byte // digest of the identities behind last

	// Of the present subscription.
	newest    Update // what the source said last, as long as it may have to be shown (again)
	known     bool   // the source has said something
	patience  *time.Timer
	spread    *time.Timer // while spreading
	spreading bool        // newest waits for its time
	settle    *time.Timer // when to see whether more is found out about a provisional caller, and how long that is from the last time
	settleIn  time.Duration
}

//go:noinline
func newFollower(d *Feed, subject Subject, st *Stream) *follower {
	return &follower{Feed: d, Stream: *st, subject: subject}
}

//go:noinline
func (f *follower) attest(ctx context.Context) (err error) {
	f.caller, err = f.subject.Attest(ctx)
	return err
}

// subscription follows the source for one attested state of the caller.
func (f *follower) subscription(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	updates, err := f.subscribe(ctx)
	if err != nil {
		cancel()
		return fmt.Errorf("the caller's identities: %w", err)
	}
	defer drain(cancel, updates)
	defer f.rest()
	for {
		due, err := f.wait(ctx, updates)
		if err == nil && due {
			err = f.push(ctx, updates)
		}
		if err != nil {
			return err
		}
	}
}

func (f *follower) subscribe(ctx context.Context) (<-chan Update, error) {
	watch := f.Source.Watch
	if f.WIT != nil {
		watch = f.WIT.WatchWIT
	}
	updates, err := watch(ctx, f.caller)
	if err != nil {
		return nil, err
	}
	f.newest, f.known = Update{}, false
	if f.caller.Provisional {
		f.settleIn = firstSettle
		f.settle = time.NewTimer(jittered(f.settleIn))
	}
	if !f.started {
		f.patience = time.NewTimer(f.IssueWait)
	}
	return updates, nil
}

// rest stops the timers.
func (f *follower) rest() {
	for _, t := range []*time.Timer{f.patience, f.spread, f.settle} {
		if t != nil {
			t.Stop()
		}
	}
	f.patience, f.spread, f.spreading, f.settle = nil, nil, false, nil
}

// Waits until it is seen whether more is found out about a provisional caller, and how long that may take.
const firstSettle, lastSettle, settleTime = time.Second, 30 * time.Second, 2 * time.Second

func jittered(d time.Duration) time.Duration { return d*4/5 + rand.N(d*2/5) }

// look says ErrSubjectChanged once all is found out about a provisional caller. What cannot be found out now changes nothing: the caller
// has what it had, and every push looks whether it is still who it was.
//
//go:noinline
func (f *follower) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	again, err := f.subject.Attest(ctx)
	if err == nil && !again.Provisional && hasAll(again.Selectors, f.caller.Selectors) {
		return ErrSubjectChanged
	}
	f.settleIn = min(2*f.settleIn, lastSettle)
	f.settle.Reset(jittered(f.settleIn))
	return nil
}

// wait waits for what happens next, and says whether newest is due to be shown.
func (f *follower) wait(ctx context.Context, updates <-chan Update) (due bool, err error) {
	var patience, spread, settle <-chan time.Time
	if f.settle != nil {
		settle = f.settle.C
	}
	if f.patience != nil {
		patience = f.patience.C
	}
	if f.spreading {
		spread = f.spread.C
	}
	select {
	case <-ctx.Done():
		return false, context.Cause(ctx)
	case <-f.subject.Done():
		return false, peer.ErrGone
	case <-patience:
		f.patience = nil
		if !f.started {
			return false, errNothingYet
		}
		return false, nil
	case next, ok := <-updates:
		if !ok {
			if ctx.Err() != nil {
				return false, context.Cause(ctx)
			}
			return false, errSourceEnded
		}
		return f.take(&next), nil
	case <-spread:
		f.calm()
		return true, nil
	case <-settle:
		return false, f.look(ctx)
	case <-f.Again:
		if err := f.ask(); err != nil {
			return false, err
		}
		if f.known {
			f.calm()
		}
		return f.known, nil
	}
}

func (f *follower) ask() error {
	if f.Ask == nil {
		return nil
	}
	return f.Ask()
}

// take takes an update, and says whether it is due at once.
//
//go:noinline
func (f *follower) take(next *Update) (due bool) {
	f.newest, f.known = f.narrow(*next), true
	if !f.maySpread(f.newest) {
		f.calm()
		return true
	}
	if !f.spreading {
		f.spreading = true
		f.spread = time.NewTimer(rand.N(f.SpreadUpdates)) // the time of a message, not a secret
	}
	return false
}

// calm ends the delay of an update.
func (f *follower) calm() {
	if f.spreading {
		f.spread.Stop()
		f.spread, f.spreading = nil, false
	}
}

func (f *follower) narrow(u Update) Update {
	if f.Narrow == nil {
		return u
	}
	return f.Narrow(u)
}

func (d *Feed) logger() *slog.Logger {
	if d.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return d.Log
}

func (f *follower) maySpread(u Update) bool {
	return f.Spread && f.SpreadUpdates > 0 && f.started && identitiesDigest(u.Identities) == f.identities
}

// push shows newest, and lets it go if nobody can ask for it again.
func (f *follower) push(ctx context.Context, updates <-chan Update) (err error) {
	if f.newest, err = f.send(ctx, f.newest, updates); err != nil {
		return err
	}
	if f.Again == nil {
		f.newest = Update{}
	}
	if f.started && f.patience != nil {
		f.patience.Stop()
		f.patience = nil
	}
	return nil
}

// send sends u, or what has come after it meanwhile, if the client does not have it already. It returns what it took.
func (f *follower) send(ctx context.Context, u Update, updates <-chan Update) (Update, error) {
	// The order matters: first what is asked for, then the subject, then the newest word on what it may have, then the message.
	if err := f.ask(); err != nil {
		return u, err
	}
	if err := f.subject.Check(ctx, f.caller); err != nil {
		return u, err
	}
	select {
	case next, ok := <-updates:
		if ok {
			u = f.narrow(next)
		}
	default:
	}
	if len(u.Identities) == 0 && !(f.BundlesOnly && f.BundlesWithoutIdentity) {
		if u.Entitled {
			return u, nil // its SVIDs are on their way
		}
		return u, ErrNoIdentity
	}
	f.progress = true
	m, err := f.Render(u)
	if format := (*formatError)(nil); errors.As(err, &format) || errors.Is(err, ErrNoIdentity) || errors.Is(err, errNoPolicies) {
		return u, err
	}
	if errors.Is(err, errNothingYet) {
		return u, nil
	}
	if err != nil {
		f.logger().LogAttrs(ctx, slog.LevelError, "update held back: no sound message can be made of it", slog.String("method", f.Method), slog.Any("err", err))
		return u, nil
	}
	if m.Send != nil && (!f.started || m.Digest != f.last) {
		if err := m.Send(); err != nil {
			return u, fmt.Errorf("%w: %w", errUnsent, err)
		}
		if m.Size > clientLimit && !f.started {
			f.logger().LogAttrs(ctx, slog.LevelWarn, "a message is larger than clients take by default: its caller matches too many registration entries",
				slog.String("method", f.Method), slog.Int("bytes", m.Size), slog.Int("identities", len(u.Identities)),
				slog.Int64("pid", int64(f.caller.PID)), slog.Uint64("uid", uint64(f.caller.UID)))
		}
		if f.OnPush != nil {
			f.OnPush(f.Method)
		}
	}
	f.started, f.last, f.identities = true, m.Digest, identitiesDigest(u.Identities)
	if ack, ok := f.Source.(Acknowledger); ok {
		ack.HandedOn(updates, u.BundleRevision)
	}
	return u, nil
}

// identitiesDigest tells two sets of SVIDs apart.
func identitiesDigest(ids []Identity) (d [sha256.Size]byte) {
	h := sha256.New()
	for i := range ids {
		writeField(h, ids[i].ID.String())
		writeField(h, ids[i].Hint)
		writeField(h, string(ids[i].Chain))
		if ids[i].WIT != nil {
			writeField(h, ids[i].WIT.Token)
		}
		for _, td := range ids[i].FederatesWith {
			writeField(h, td.Name())
		}
		writeField(h, "")
	}
	h.Sum(d[:0])
	return d
}

func writeField(h hash.Hash, field string) {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(field)))
	h.Write(n[:])
	h.Write([]byte(field))
}
