package etcd

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"sync/atomic"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/durable"
)

// ErrHistory says that what etcd holds is not what followed from the state seen before: it was restored from a snapshot, replaced,
// or the endpoints lead to two clusters. The store has stopped. Opened again it goes on with a new epoch.
var ErrHistory = errors.New("etcd went back to an earlier state, or is another one")

// A mark is written by each commit, last, with a value that no other commit has. So the newest mark's revision is the newest
// revision of the store, whatever else is in etcd; a batch of the watch is whole when its mark is there; changes without a mark
// are not ours; and a mark that is older than one seen before, or at the same revision another one, shows a restored etcd.
type mark struct {
	Revision store.Revision `json:"revision"`
	Nonce    string         `json:"nonce"`
}

func randomName() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it never fails
	return hex.EncodeToString(b[:])
}

// history is what this process knows of the store's history.
type history struct {
	epoch    string
	epochMod int64
	cluster  uint64

	wentBack atomic.Bool // the newest commit that was seen is not in etcd any more

	mu     sync.Mutex // guards newest and saved
	newest mark       // that anybody was told of as committed
	saved  mark
}

func (h *history) known() mark {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.newest
}

// learn notes a mark that is committed.
func (h *history) learn(m mark) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if m.Revision > h.newest.Revision {
		h.newest = m
	}
}

// continues tells whether a state with the newest mark m can follow from one with the mark known.
func (m mark) continues(known mark) bool {
	return m.Revision > known.Revision || m == known
}

func (s *Store) parseMark(kvs []*kv) (mark, error) {
	if len(kvs) == 0 {
		return mark{}, fmt.Errorf("%w: %q is missing below %s, although there is an epoch", ErrHistory, markKey, s.c.Prefix)
	}
	nonce, err := unseal(markKey, kvs[0].Value)
	return mark{store.Revision(kvs[0].ModRevision), string(nonce)}, err
}

// checkMark compares the mark of a linearizable read with what was known before that read was begun.
func (s *Store) checkMark(m, before mark) error {
	if !m.continues(before) {
		s.history.wentBack.Store(true)
		return s.fail(fmt.Errorf("%w: its newest commit of ours has revision %d, revision %d was seen before", ErrHistory, m.Revision, before.Revision))
	}
	s.history.learn(m)
	return nil
}

// checkCluster stops the store when two clusters answer.
func (s *Store) checkCluster(h *pb.ResponseHeader) error {
	if s.history.cluster != 0 && h.GetClusterId() != s.history.cluster {
		return s.fail(fmt.Errorf("%w: cluster %x answered, before it was %x (do all endpoints lead to one cluster?)", ErrHistory, h.GetClusterId(), s.history.cluster))
	}
	return nil
}

// openHistory finds the store's epoch or makes the store, and compares it with what this replica has seen before.
func (s *Store) openHistory(ctx context.Context) error {
	remembered, err := s.recall()
	if err != nil {
		return err
	}
	read := []clientv3.Op{clientv3.OpGet(s.key(epochKey)), clientv3.OpGet(s.key(markKey))}
	rsp, err := s.client.Txn(ctx).Then(read...).Commit()
	if err != nil {
		return err
	}
	if len(rsp.Responses[0].GetResponseRange().Kvs) == 0 {
		if remembered.Epoch != "" {
			return fmt.Errorf("%w: there is nothing below %s, but this replica has used it before, up to revision %d (was etcd replaced? restore it; to begin anew with other authorities, remove %s)",
				ErrHistory, s.c.Prefix, remembered.Newest.Revision, s.memory())
		}
		rsp, err = s.client.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(s.key(epochKey)), "=", 0), clientv3.Compare(clientv3.CreateRevision(s.key(markKey)), "=", 0)).
			Then(append([]clientv3.Op{clientv3.OpPut(s.key(epochKey), seal(epochKey, []byte(randomName()))), clientv3.OpPut(s.key(markKey), seal(markKey, []byte(randomName())))}, read...)...).
			Else(read...).Commit()
		if err != nil {
			return err
		}
		if rsp.Succeeded {
			rsp.Responses = rsp.Responses[2:]
		}
	}
	s.history.cluster = rsp.Header.ClusterId
	epoch, newest := rsp.Responses[0].GetResponseRange().Kvs, rsp.Responses[1].GetResponseRange().Kvs
	if len(epoch) == 0 {
		return fmt.Errorf("%w: %q is missing below %s, although there is a mark", ErrHistory, epochKey, s.c.Prefix)
	}
	name, err := unseal(epochKey, epoch[0].Value)
	if err != nil {
		return err
	}
	m, err := s.parseMark(newest)
	if err != nil {
		return err
	}
	s.history.epoch, s.history.epochMod, s.history.newest = string(name), epoch[0].ModRevision, m
	switch {
	case remembered.Epoch == "":
	case remembered.Epoch != s.history.epoch:
		s.c.Log.Warn("the store has another epoch than this replica has seen before: etcd was restored", "epoch", s.history.epoch, "before", remembered.Epoch)
	default:
		lost, err := s.lost(ctx, m, remembered)
		if err != nil {
			return err
		}
		if lost {
			return s.renewEpoch(ctx, m, remembered.Newest)
		}
	}
	return nil
}

// lost tells whether the commit that this replica remembers is not in etcd's history. A history that was compacted since can
// be asked no more; a later state is then taken for one that followed.
func (s *Store) lost(ctx context.Context, newest mark, remembered memory) (bool, error) {
	if !newest.continues(remembered.Newest) || remembered.WentBack {
		return true, nil
	}
	rsp, err := s.client.Get(ctx, s.key(markKey), clientv3.WithRev(int64(remembered.Newest.Revision)))
	if errors.Is(s.mapped(ctx, err), store.ErrCompacted) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if len(rsp.Kvs) == 0 {
		return true, nil
	}
	then, err := s.parseMark(rsp.Kvs)
	return then != remembered.Newest, err
}

// renewEpoch gives a restored store a new name. Of several replicas that notice one does it, and the others' stores stop when they
// see it. No mark is written: a restored store has no newer revision until somebody commits.
func (s *Store) renewEpoch(ctx context.Context, newest, remembered mark) error {
	name := randomName()
	rsp, err := s.client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(s.key(epochKey)), "=", s.history.epochMod)).
		Then(clientv3.OpPut(s.key(epochKey), seal(epochKey, []byte(name)))).Else(clientv3.OpGet(s.key(epochKey))).Commit()
	if err != nil {
		return err
	}
	if rsp.Succeeded {
		s.c.Log.Error("etcd was restored: what was committed later is lost, bans and revocations too; the store gets a new epoch, and agents everything afresh",
			"epoch", name, "before", s.history.epoch, "revision", newest.Revision, "seen", remembered.Revision)
		s.history.epoch, s.history.epochMod = name, rsp.Header.Revision
		return nil
	}
	kvs := rsp.Responses[0].GetResponseRange().Kvs
	if len(kvs) == 0 {
		return fmt.Errorf("%w: %q was removed below %s", ErrHistory, epochKey, s.c.Prefix)
	}
	other, err := unseal(epochKey, kvs[0].Value)
	s.history.epoch, s.history.epochMod = string(other), kvs[0].ModRevision
	return err
}

// memoryName is the file in Config.Dir.
const memoryName = "etcd.json"

type memory struct {
	V      int    `json:"v"`
	Epoch  string `json:"epoch"`
	Newest mark   `json:"newest"`
	// WentBack says that Newest was missed while the process ran, whatever etcd has by now.
	WentBack bool `json:"went_back,omitempty"`
}

func (s *Store) memory() string { return filepath.Join(s.c.Dir, memoryName) }

// recall reads what remember wrote at an earlier start.
func (s *Store) recall() (memory, error) {
	if s.c.Dir == "" {
		return memory{}, nil
	}
	if err := durable.MkdirAll(s.c.Dir, 0o700); err != nil {
		return memory{}, err
	}
	data, err := durable.ReadFile(s.memory(), maxFileBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return memory{}, nil
	}
	if err != nil {
		return memory{}, err
	}
	var m memory
	if err := json.Unmarshal(data, &m); err != nil {
		return memory{}, fmt.Errorf("%s: %w (if it is lost, remove it: only a restored etcd would then not be noticed)", s.memory(), err)
	}
	if m.V != 1 {
		return memory{}, fmt.Errorf("%s has format %d, this signet reads 1: a newer signet wrote it", s.memory(), m.V)
	}
	return m, nil
}

// remember writes down the newest commit that this replica knows of, if it is another one than last time.
func (s *Store) remember() error {
	if s.c.Dir == "" {
		return nil
	}
	h := &s.history
	newest := h.known()
	h.mu.Lock()
	same := newest == h.saved
	h.mu.Unlock()
	if same && !h.wentBack.Load() {
		return nil
	}
	data, err := json.Marshal(memory{1, h.epoch, newest, h.wentBack.Load()})
	if err != nil {
		return err
	}
	if err := durable.WriteFile(s.memory(), data, 0o600); err != nil {
		return err
	}
	h.mu.Lock()
	h.saved = newest
	h.mu.Unlock()
	return nil
}
