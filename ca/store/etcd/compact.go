package etcd

import (
	"context"
	"errors"
	"strconv"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/signet-id/signet/ca/store"
)

// keepCompacting removes old history, together with the other replicas: about each Config.Compaction one of them removes what was
// history already at the time before.
//
// They meet at one key, which holds the newest revision as of its last change. Whoever finds it unchanged for the whole interval
// replaces it, and may compact to what it held. No clock is compared with another, and no replica is needed.
func (s *Store) keepCompacting() {
	var seen int64 // the revision of the key at the last look
	refused := false
	for pause(s.closing, jittered(s.c.Compaction)) {
		ctx, cancel := context.WithTimeout(s.closing, s.c.Timeout)
		now, upTo, err := s.compactionTurn(ctx, seen)
		if err == nil && upTo > 0 {
			err = s.compact(ctx, upTo)
		}
		cancel()
		if errors.Is(rpctypes.Error(err), rpctypes.ErrPermissionDenied) {
			// So it is with authentication on, whatever the role. Nobody wants to read it each time.
			if !refused {
				s.c.Log.Info("etcd lets only its root user compact: start it with --auto-compaction-mode periodic --auto-compaction-retention 10m, or its history grows without end")
			}
			refused = true
			continue
		}
		if err != nil {
			if s.closing.Err() == nil {
				s.c.Log.Warn("compacting etcd's history; it grows until this succeeds", "err", s.mapped(s.closing, err))
			}
			continue
		}
		seen = now
	}
}

// compactionTurn looks at the key, seen at the revision seen the last time. It returns where the key is now and, if it was this
// replica's turn, the revision up to which history can go.
func (s *Store) compactionTurn(ctx context.Context, seen int64) (now int64, upTo store.Revision, err error) {
	rsp, err := s.client.Txn(ctx).Then(clientv3.OpGet(s.key(compactKey)), clientv3.OpGet(s.key(markKey))).Commit()
	if err != nil {
		return 0, 0, err
	}
	m, err := s.parseMark(rsp.Responses[1].GetResponseRange().Kvs)
	if err != nil {
		return 0, 0, err
	}
	var at, held int64
	if kvs := rsp.Responses[0].GetResponseRange().Kvs; len(kvs) > 0 {
		at = kvs[0].ModRevision
		value, err := unseal(compactKey, kvs[0].Value)
		if err != nil {
			return 0, 0, err
		}
		if held, err = strconv.ParseInt(string(value), 10, 64); err != nil {
			return 0, 0, err
		}
	}
	if at != 0 && (at != seen || held == int64(m.Revision)) {
		return at, 0, nil // another replica was at it, or nothing was committed
	}
	put, err := s.client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(s.key(compactKey)), "=", at)).
		Then(clientv3.OpPut(s.key(compactKey), seal(compactKey, strconv.AppendInt(nil, int64(m.Revision), 10)))).Commit()
	if err != nil || !put.Succeeded {
		return 0, 0, err
	}
	return put.Header.Revision, store.Revision(held), nil
}

// compact removes the history before rev. It need not be complete when it returns.
func (s *Store) compact(ctx context.Context, rev store.Revision) error {
	_, err := s.client.Compact(ctx, int64(rev))
	if errors.Is(rpctypes.Error(err), rpctypes.ErrCompacted) {
		return nil // by etcd itself, or by others that use it
	}
	return err
}

// memoryEvery is how often the newest revision is written down, if there is another one.
const memoryEvery = 10 * time.Second

func (s *Store) keepMemory() {
	for {
		if err := s.remember(); err != nil {
			s.c.Log.Warn("remembering the store's newest revision; a restored etcd may not be noticed after a restart", "err", err)
		}
		if !pause(s.closing, memoryEvery) {
			return
		}
	}
}
