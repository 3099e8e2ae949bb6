"""molehill's servers as replicas of Ray Serve.

`settings`, `requests` and `server_process` know nothing of Ray.
"""
