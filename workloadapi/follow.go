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

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/signet-id/signet/workloadapi/peer"
)

// maxAttempts bounds how often a call is begun anew because the calling process changed meanwhile.
const maxAttempts = 5

// attest says what the process is, as it is now.
//
// A process may exec or change its user while it is looked at. What was found out counts only if the process is still in
// the state that it was found out about; otherwise a program could collect another one's selectors.
func (s *Server) attest(ctx context.Context, p *peer.Process) (Caller, error) {
	leave, err := s.gate.Enter(ctx, p.UID)
	if err != nil {
		return Caller{}, err
	}
	defer leave()
	for range maxAttempts {
		caller, err := s.cfg.Attestor.Attest(ctx, p)
		if err != nil {
			return Caller{}, fmt.Errorf("attesting process %d: %w", p.PID, err)
		}
		now, err := p.Snapshot()
		if err != nil {
			return Caller{}, err
		}
		if now.Equal(caller.State) {
			return caller, nil
		}
	}
	return Caller{}, errUnsteady
}

// check says whether the process is still what caller describes: nil, errCallerChanged or why it is not answered at all.
func (s *Server) check(ctx context.Context, p *peer.Process, caller Caller) error {
	leave, err := s.gate.Enter(ctx, p.UID)
	if err != nil {
		return err
	}
	defer leave()
	now, err := p.Snapshot()
	if err != nil {
		return err
	}
	if !now.Equal(caller.State) {
		return errCallerChanged
	}
	return nil
}

// Answer attests the caller of a unary call, lets f find the answer, and returns nil only if the process is by then still
// the one that f was told about. f runs again for a process that changed.
func (s *Server) Answer(ctx context.Context, f func(Caller) error) error {
	p, err := peer.FromContext(ctx)
	if err != nil {
		return err
	}
	for range maxAttempts {
		caller, err := s.attest(ctx, p)
		if err != nil {
			return err
		}
		if err := f(caller); err != nil {
			return err
		}
		if err := s.check(ctx, p, caller); err != errCallerChanged {
			return err
		}
	}
	return errUnsteady
}

// Current returns the caller's state as it is now, which has at least one identity. The error is ErrNoIdentity if it has
// none.
func (s *Server) Current(ctx context.Context, caller Caller) (Update, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.IssueWait)
	updates, err := s.cfg.Source.Watch(ctx, caller)
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
	// has, since it would discard half a message too, and the error is logged.
	Render func(Update) (Message, error)

	// BundlesOnly streams also go to callers without an identity, if the configuration allows it.
	BundlesOnly bool

	// Spread lets updates that change bundles only be delayed, by up to Config.SpreadUpdates.
	Spread bool
}

// clientLimit is what gRPC's clients take in one message unless they are told otherwise.
const clientLimit = 4 << 20

// A Message is one rendered update.
type Message struct {
	// Digest is the same if and only if the message is.
	Digest [sha256.Size]byte

	// Size is its length in bytes.
	Size int

	// Send writes the message to the stream.
	Send func() error
}

// Show renders a protobuf message for a server stream.
func Show[M any](m *M, ss grpc.ServerStreamingServer[M]) (Message, error) {
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

// Follow serves a stream: the caller's state at once, and again whenever the message would differ from the last one. It
// returns when the call has to end, and with which error. [Workload API §4.2, §4.3]
//
// Before each message the process is looked at again. One that has become another program or user is attested anew, and
// goes on with the identities of what it is now.
func (s *Server) Follow(ctx context.Context, st Stream) error {
	p, err := peer.FromContext(ctx)
	if err != nil {
		return err
	}
	f := &follower{Server: s, Stream: st, process: p}
	for idle := 0; idle < maxAttempts; idle++ {
		f.progress = false
		if f.caller, err = s.attest(ctx, p); err != nil {
			return err
		}
		if err = f.subscription(ctx); err != errCallerChanged {
			return err
		}
		if f.progress {
			idle = -1
		}
	}
	return errUnsteady
}

// A follower is one stream being served, by one goroutine.
type follower struct {
	*Server
	Stream
	process  *peer.Process
	caller   Caller
	progress bool // a message was due since the last attestation

	started    bool // a message has been sent
	last       [sha256.Size]byte
	identities [sha256.Size]byte // digest of the identities behind last
}

// subscription follows the source for one attested state of the caller.
func (f *follower) subscription(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	updates, err := f.cfg.Source.Watch(ctx, f.caller)
	if err != nil {
		cancel()
		return fmt.Errorf("the caller's identities: %w", err)
	}
	defer drain(cancel, updates)

	patience := time.NewTimer(f.cfg.IssueWait)
	defer patience.Stop()
	spread := time.NewTimer(time.Hour)
	spread.Stop()
	defer spread.Stop()
	spreading := false

	var u Update
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-f.process.Done():
			return peer.ErrGone
		case <-patience.C:
			if !f.started {
				return errNothingYet
			}
			continue
		case next, ok := <-updates:
			if !ok {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				return errSourceEnded
			}
			u = next
			if f.maySpread(u) {
				if !spreading {
					spreading = true
					spread.Reset(rand.N(f.cfg.SpreadUpdates)) // the time of a message, not a secret
				}
				continue
			}
			spreading = false
			spread.Stop()
		case <-spread.C:
			spreading = false
		}
		if err := f.push(ctx, u, updates); err != nil {
			return err
		}
	}
}

func (f *follower) maySpread(u Update) bool {
	return f.Spread && f.cfg.SpreadUpdates > 0 && f.started && identitiesDigest(u.Identities) == f.identities
}

// push sends u, or what has come after it meanwhile, if the client does not have it already.
func (f *follower) push(ctx context.Context, u Update, updates <-chan Update) error {
	// The order matters: first the process, then the newest word on what it may have, then the message.
	if err := f.check(ctx, f.process, f.caller); err != nil {
		return err
	}
	select {
	case next, ok := <-updates:
		if ok {
			u = next
		}
	default:
	}
	if len(u.Identities) == 0 && !(f.BundlesOnly && f.cfg.AllowBundlesWithoutIdentity) {
		if u.Entitled {
			return nil // its SVIDs are on their way
		}
		return ErrNoIdentity
	}
	f.progress = true
	m, err := f.Render(u)
	if format := (*formatError)(nil); errors.As(err, &format) {
		return err
	}
	if err != nil {
		f.log.LogAttrs(ctx, slog.LevelError, "update held back: no sound message can be made of it", slog.String("method", f.Method), slog.Any("err", err))
		return nil
	}
	if !f.started || m.Digest != f.last {
		if err := m.Send(); err != nil {
			return fmt.Errorf("%w: %w", errUnsent, err)
		}
		if m.Size > clientLimit && !f.started {
			f.log.LogAttrs(ctx, slog.LevelWarn, "a message is larger than clients take by default: its caller matches too many registration entries",
				slog.String("method", f.Method), slog.Int("bytes", m.Size), slog.Int("identities", len(u.Identities)),
				slog.Int64("pid", int64(f.caller.PID)), slog.Uint64("uid", uint64(f.caller.UID)))
		}
		if f.cfg.OnPush != nil {
			f.cfg.OnPush(f.Method)
		}
	}
	f.started, f.last, f.identities = true, m.Digest, identitiesDigest(u.Identities)
	if ack, ok := f.cfg.Source.(Acknowledger); ok {
		ack.HandedOn(updates, u.BundleRevision)
	}
	return nil
}

// identitiesDigest tells two sets of SVIDs apart.
func identitiesDigest(ids []Identity) (d [sha256.Size]byte) {
	h := sha256.New()
	for i := range ids {
		writeField(h, ids[i].ID.String())
		writeField(h, ids[i].Hint)
		writeField(h, string(ids[i].Chain))
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
