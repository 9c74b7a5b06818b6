//go:build cgo

package keystores_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// gcpCredentials writes the credentials of a service account that the stand-in's token endpoint takes.
func gcpCredentials(dir string) (string, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return "", err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", err
	}
	content, err := json.Marshal(map[string]string{
		"type": "service_account", "project_id": "p", "private_key_id": "k", "client_email": "signet@p.iam.gserviceaccount.com", "client_id": "1",
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), "token_uri": "https://oauth2.googleapis.com/token",
	})
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "gcp.json")
	return path, os.WriteFile(path, content, 0o600)
}

// A gcp is Google Cloud KMS, as far as the driver calls it.
type gcp struct {
	kmspb.UnimplementedKeyManagementServiceServer
	vault *vault
}

func registerGCP(s *grpc.Server, v *vault) {
	kmspb.RegisterKeyManagementServiceServer(s, gcp{vault: v})
}

// enter checks that the caller has a token, and makes the faults.
func (g gcp) enter(ctx context.Context, call string) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if a := md.Get("authorization"); len(a) != 1 || !strings.HasPrefix(a[0], "Bearer ") {
		return status.Error(codes.Unauthenticated, "no token")
	}
	if err := g.vault.refuse(call); err != nil {
		return status.Error(codes.Internal, err.Error())
	}
	return nil
}

func (g gcp) GetKeyRing(ctx context.Context, r *kmspb.GetKeyRingRequest) (*kmspb.KeyRing, error) {
	return &kmspb.KeyRing{Name: r.Name}, g.enter(ctx, "GetKeyRing")
}

func (g gcp) CreateCryptoKey(ctx context.Context, r *kmspb.CreateCryptoKeyRequest) (*kmspb.CryptoKey, error) {
	if err := g.enter(ctx, "CreateCryptoKey"); err != nil {
		return nil, err
	}
	name := r.Parent + "/cryptoKeys/" + r.CryptoKeyId
	if g.vault.find(func(k *vaultKey) bool { return k.name == name }) != nil {
		return nil, status.Error(codes.AlreadyExists, name)
	}
	signer, err := makeSigner(map[kmspb.CryptoKeyVersion_CryptoKeyVersionAlgorithm]string{
		kmspb.CryptoKeyVersion_EC_SIGN_P256_SHA256: "P256", kmspb.CryptoKeyVersion_EC_SIGN_P384_SHA384: "P384", kmspb.CryptoKeyVersion_RSA_SIGN_PKCS1_2048_SHA256: "RSA2048",
	}[r.CryptoKey.VersionTemplate.Algorithm])
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	g.vault.add(&vaultKey{id: name + "/cryptoKeyVersions/1", name: name, signer: signer})
	return &kmspb.CryptoKey{Name: name, Purpose: r.CryptoKey.Purpose}, nil
}

func (g gcp) key(id string) (*vaultKey, error) {
	if k := g.vault.find(func(k *vaultKey) bool { return k.id == id }); k != nil {
		return k, nil
	}
	return nil, status.Error(codes.NotFound, fmt.Sprintf("CryptoKeyVersion %s not found.", id))
}

func (g gcp) GetPublicKey(ctx context.Context, r *kmspb.GetPublicKeyRequest) (*kmspb.PublicKey, error) {
	if err := g.enter(ctx, "GetPublicKey"); err != nil {
		return nil, err
	}
	k, err := g.key(r.Name)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(k.signer.Public())
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &kmspb.PublicKey{Name: r.Name, Pem: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))}, nil
}

func (g gcp) AsymmetricSign(ctx context.Context, r *kmspb.AsymmetricSignRequest) (*kmspb.AsymmetricSignResponse, error) {
	if err := g.enter(ctx, "AsymmetricSign"); err != nil {
		return nil, err
	}
	k, err := g.key(r.Name)
	if err != nil {
		return nil, err
	}
	digest, hash := r.Digest.GetSha256(), crypto.SHA256
	if digest == nil {
		digest, hash = r.Digest.GetSha384(), crypto.SHA384
	}
	signature, err := k.signer.Sign(rand.Reader, digest, hash)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &kmspb.AsymmetricSignResponse{Name: r.Name, Signature: signature}, nil
}
