package svidfiles

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/spiffe"
)

// WITNames are the names of the token and of the key of the i-th WIT-SVID.
func WITNames(i int) (token, key string) {
	token, key = "wit.jwt", "wit-key.jwk"
	if i > 0 {
		return fmt.Sprintf("%d.%s", i, token), fmt.Sprintf("%d.%s", i, key)
	}
	return token, key
}

// witFiles are the files of WIT-SVIDs: each token, and the JWK of the key that it is bound to. A key that does not fit its
// token is refused: no proof that it makes would be accepted.
func witFiles(svids []*witsvid.SVID) ([]File, error) {
	var files []File
	for i, s := range svids {
		key, ok := s.PrivateKey.(*ecdsa.PrivateKey)
		if !ok {
			return nil, fmt.Errorf("the key of the WIT-SVID %s is a %T, not an EC key", s.ID, s.PrivateKey)
		}
		if !key.PublicKey.Equal(s.PublicKey) {
			return nil, fmt.Errorf("the WIT-SVID %s is bound to another key than the one that came with it", s.ID)
		}
		jwk, err := spiffe.MarshalWITKey(key)
		if err != nil {
			return nil, fmt.Errorf("the key of the WIT-SVID %s: %w", s.ID, err)
		}
		tokenName, keyName := WITNames(i)
		files = append(files, File{Name: tokenName, Data: []byte(s.Marshal() + "\n"), Secret: true}, File{Name: keyName, Data: []byte(jwk + "\n"), Secret: true})
	}
	return files, nil
}

// idAsked is the ID whose WIT-SVIDs are asked for. Empty: all.
func (k *Keeper) idAsked() string {
	if k.cfg.ID.IsZero() {
		return ""
	}
	return k.cfg.ID.String()
}

// followWIT follows WIT-SVIDs until ctx ends, or the agent says that it has none for anybody.
func (k *Keeper) followWIT(ctx context.Context) (err error) {
	client, err := workloadapi.New(ctx, k.cfg.Options...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, client.Close()) }()
	return client.WatchWITSVIDs(ctx, &k.latest, k.idAsked())
}

// OnWITSVIDsUpdate implements workloadapi.WITSVIDWatcher.
func (l *latest) OnWITSVIDsUpdate(svids []*witsvid.SVID) { l.put(func() { l.wit, l.err = svids, nil }) }

// OnWITSVIDsWatchError implements workloadapi.WITSVIDWatcher.
func (l *latest) OnWITSVIDsWatchError(err error) {
	if status.Code(err) != codes.Unimplemented { // with that the watch ends
		l.put(func() { l.err = err })
	}
}
